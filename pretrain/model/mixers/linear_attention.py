"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a state that only adds, and never forgets.

    S_t = S_{t-1} + phi(k_t) v_t^T,   o_t = S_t^T phi(q_t) / sqrt(K),   y = W_o RMSNorm(o)

The paper divides o_t by phi(q_t)^T sum phi(k). That divisor is one positive number per head and token, so the norm of each
head (as in TransNormer, arXiv 2210.10340) takes it back, and it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import gated_linear_attention
from pretrain.model.linear_parts import LinearMixer, split_width
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.sublayer import MixerConfig

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1.0,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


class LinearAttentionConfig(MixerConfig):
    kind: Literal["linear_attention"] = "linear_attention"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(None, ge=1)
    """Channels of a query/key head; width / heads when left out."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; width / heads when left out."""
    conv_width: int = Field(0, ge=0)
    """Taps of a short convolution with SiLU on q, k and v; 0 for none, as in the paper."""
    feature_map: Literal["elu", "relu", "silu", "identity"] = "elu"
    """phi; elu stands for elu(x) + 1, the paper's."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> LinearAttention:
        return LinearAttention(width, self)


class LinearAttention(LinearMixer):
    flops_per_entry = 4.0  # write (2), read (2)

    def __init__(self, width: int, config: LinearAttentionConfig):
        sizes = split_width(config.heads, width, config.head_dim, config.value_dim, (1.0, 1.0))
        super().__init__(width, sizes, config.conv_width, config.norm_eps)
        self.feature_map = config.feature_map

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        phi = FEATURE_MAPS[self.feature_map]
        return sequence.recur(gated_linear_attention, phi(q), phi(k), v, None, cache=cache)
