"""Multi-scale retention, RetNet (Sun et al. 2023, arXiv 2307.08621, section 2.1): linear attention that forgets at a fixed
rate per head, with rotary positions on q and k.

    S_t = gamma_h S_{t-1} + k_t v_t^T,  gamma_h = 1 - 2^(-5 - h),   o_t = S_t^T q_t / sqrt(K)
    y = W_o (GroupNorm(o) * SiLU(W_g x))

The paper's further divisors of q k^T scale a whole head of one token, which the norm takes back; they are left out, and
so is xPos's damping, whose part the decay plays.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from kernels import gated_linear_attention
from kernels.gated_linear_attention.members import retention_gate
from pretrain.model.linear_parts import LinearMixer, split_width, wide
from pretrain.model.rotary import apply_rotary
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.sublayer import MixerConfig, require


class RetNetConfig(MixerConfig):
    kind: Literal["retnet"] = "retnet"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(None, ge=2)
    """Channels of a query/key head, even; width / heads when left out (256 in the paper)."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; 2 * width / heads when left out."""
    conv_width: int = Field(0, ge=0)
    """Taps of a short convolution with SiLU on q, k and v; 0 for none, as in the paper."""
    rope_theta: float = Field(10_000.0, gt=0)
    center: bool = True
    """Subtract each head's mean before its RMS norm, which makes it the paper's group norm."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> RetNet:
        return RetNet(width, self)


class RetNet(LinearMixer):
    def __init__(self, width: int, config: RetNetConfig):
        sizes = split_width(config.heads, width, config.head_dim, config.value_dim, (1.0, 2.0))
        require(sizes.key % 2 == 0, f"head_dim={sizes.key} is odd; rotary positions turn pairs of channels")
        super().__init__(width, sizes, config.conv_width, config.norm_eps)
        self.gate = nn.Linear(width, sizes.value_width, bias=False)
        self.rope_theta, self.center = config.rope_theta, config.center
        self.first_head, self.all_heads = 0, sizes.heads  # in a part: where its heads begin among all

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        cos, sin = sequence.rotary(self.head_dim, self.rope_theta)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        rates = retention_gate(self.all_heads, x.device)[self.first_head : self.first_head + self.heads]
        g = rates.expand(*x.shape[:2], self.heads)
        o = sequence.recur(gated_linear_attention, q, k, v, g, cache=cache)
        return (wide(o) - wide(o).mean(dim=-1, keepdim=True)).to(o.dtype) if self.center else o

    def shrink(self, rank: int, ranks: int) -> None:
        super().shrink(rank, ranks)
        self.first_head = rank * self.heads
