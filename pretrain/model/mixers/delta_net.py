"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a linear-time mixer that replaces the old value of a key by the new one.

    q, k, v = SiLU(conv(W x)),  q and k of unit length,  beta = sigmoid(W_b x)
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y = W_o RMSNorm(o)

The paper has no output gate and no forgetting; `gated_delta_net` has both.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from pretrain.model.linear_parts import DeltaMixer, grouped_heads
from pretrain.model.sublayer import MixerConfig


class DeltaNetConfig(MixerConfig):
    kind: Literal["delta_net"] = "delta_net"
    heads: int = Field(ge=1)
    """Query/key heads."""
    value_heads: int | None = Field(None, ge=1)
    """Value heads, a multiple of heads; the same number when left out. Each has its own state and beta."""
    head_dim: int = Field(128, ge=1)
    """Channels of a query/key head."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; head_dim when left out."""
    conv_width: int = Field(4, ge=1)
    """Taps of the short convolution on q, k and v."""
    output_gate: bool = False
    """Multiply the normalised output by SiLU(W_g x)."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) in place of (0, 1), so that a write can reflect the state (arXiv 2411.12537)."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> DeltaNet:
        return DeltaNet(width, self)


class DeltaNet(DeltaMixer):
    def __init__(self, width: int, config: DeltaNetConfig):
        sizes = grouped_heads(config.heads, config.value_heads, config.head_dim, config.value_dim)
        super().__init__(width, sizes, config.conv_width, config.norm_eps, config.negative_eigenvalues)
        if config.output_gate:
            self.gate = nn.Linear(width, sizes.value_width, bias=False)
