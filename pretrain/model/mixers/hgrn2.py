"""HGRN2 (Qin et al. 2024, arXiv 2404.07904): gated linear attention whose key is what the gate lets go.

    f = b + (1 - b) sigmoid(W_f x)  per channel,   k = 1 - f
    S_t = Diag(f_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T SiLU(W_q x) / sqrt(K),   y = W_o RMSNorm(o)

b bounds the forget gate from below and rises with depth, so that upper layers remember longer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import gated_linear_attention
from kernels.gated_linear_attention.members import hgrn2_gate_and_key
from pretrain.model.linear_parts import LinearMixer, split_width
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.sublayer import MixerConfig


class HGRN2Config(MixerConfig):
    kind: Literal["hgrn2"] = "hgrn2"
    heads: int = Field(ge=1)
    """Heads; width / 128 in the paper."""
    head_dim: int | None = Field(None, ge=1)
    """Channels of a query and of a gate: the expansion of the state; width / heads when left out."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; width / heads when left out."""
    conv_width: int = Field(0, ge=0)
    """Taps of a short convolution on q, f and v, without an activation; 0 for none, as in the paper."""
    lower_bound: float | None = Field(None, ge=0, lt=1)
    """Lower bound of the forget gate; when left out it rises evenly over the HGRN2 layers, from 0 by 1/layers,
    which is where the learned bounds of the paper begin."""
    norm_per_head: bool = False
    """Normalise each head by itself in place of all channels together."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> HGRN2:
        return HGRN2(width, self)


class HGRN2(LinearMixer):
    conv_activation = None

    def __init__(self, width: int, config: HGRN2Config):
        sizes = split_width(config.heads, width, config.head_dim, config.value_dim, (1.0, 1.0))
        super().__init__(
            width, sizes, config.conv_width, config.norm_eps, None if config.norm_per_head else sizes.value_width
        )
        self.fixed_bound = config.lower_bound
        self.lower_bound = config.lower_bound or 0.0

    def place(self, index: int, count: int) -> None:
        if self.fixed_bound is None:
            self.lower_bound = index / count

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        # `k` holds the gate's logits. The bound is made on the device: a copy from the host would wait for it.
        bound = torch.full((), self.lower_bound, dtype=torch.float32, device=x.device)
        g, key = hgrn2_gate_and_key(k, bound)
        return sequence.recur(gated_linear_attention, F.silu(q), key, v, g, cache=cache)
