"""Gated linear attention, GLA (Yang et al. 2023, arXiv 2312.06635, section 4.4): a state that forgets each key channel by
a gate computed from the input.

    g = logsigmoid(W_up W_down x + b) / normalizer  per channel
    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y = W_o (RMSNorm(o) * SiLU(W_r x))
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import gated_linear_attention
from kernels.gated_linear_attention.members import gla_gate
from pretrain.model.linear_parts import LinearMixer, LowRank, last_rows, split_width
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.split import Split
from pretrain.model.sublayer import MixerConfig


class GatedLinearAttentionConfig(MixerConfig):
    kind: Literal["gla"] = "gla"
    heads: int = Field(4, ge=1)
    head_dim: int | None = Field(None, ge=1)
    """Channels of a query/key head; width / 2 / heads when left out."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; width / heads when left out."""
    conv_width: int = Field(0, ge=0)
    """Taps of a short convolution with SiLU on q, k and v; 0 for none, as in the paper."""
    gate_rank: int = Field(16, ge=1)
    """Inner channels of the gate's projection."""
    gate_normalizer: float = Field(16.0, gt=0)
    """Divides the log gate: larger remembers longer."""
    gate_bias: float = 0.0
    """Initial bias of the gate's logits. At 0 a state halves in gate_normalizer tokens; at 4 it takes 38 times as many."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> GatedLinearAttention:
        return GatedLinearAttention(width, self)


class GatedLinearAttention(LinearMixer):
    def __init__(self, width: int, config: GatedLinearAttentionConfig):
        sizes = split_width(config.heads, width, config.head_dim, config.value_dim, (0.5, 1.0))
        super().__init__(width, sizes, config.conv_width, config.norm_eps)
        self.gate = nn.Linear(width, sizes.value_width, bias=False)
        self.decay = LowRank(width, config.gate_rank, sizes.key_width, bias=True)
        self.gate_normalizer, self.gate_bias = config.gate_normalizer, config.gate_bias
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.decay.up.bias.fill_(self.gate_bias)

    def init_weights(self, std: float) -> None:
        self.reset_parameters()  # the decoder has set every linear bias to zero

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        g = gla_gate(self.decay(x).unflatten(-1, (self.heads, self.head_dim)), self.gate_normalizer)
        return sequence.recur(gated_linear_attention, q, k, v, g, cache=cache)

    def splits(self) -> dict[str, Split]:
        return super().splits() | last_rows(self.decay, "decay", self.head_sections()[0])
