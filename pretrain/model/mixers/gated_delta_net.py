"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464): a linear-time mixer with a state per head.

    q, k, v = SiLU(conv(W x)),  q and k of unit length,  beta = sigmoid(W_b x),  g = -exp(A_log) softplus(W_a x + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    y = W_o (RMSNorm(o) * SiLU(W_g x))

Without `gate_decay` it is DeltaNet (arXiv 2406.06484) with an output gate.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.gated_linear_attention.members import gdn_gate
from pretrain.model.linear_parts import DeltaMixer, draw_rates, draw_steps, grouped_heads
from pretrain.model.split import Split, rows
from pretrain.model.sublayer import MixerConfig


class GatedDeltaNetConfig(MixerConfig):
    kind: Literal["gated_delta_net"] = "gated_delta_net"
    heads: int = Field(ge=1)
    """Query/key heads."""
    value_heads: int | None = Field(None, ge=1)
    """Value heads, a multiple of heads; the same number when left out. Each has its own state, gate and beta."""
    head_dim: int = Field(128, ge=1)
    """Channels of a query/key head."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; head_dim when left out."""
    conv_width: int = Field(4, ge=1)
    """Taps of the short convolution on q, k and v."""
    gate_decay: bool = True
    """Data-dependent forgetting. Without it, the plain delta rule."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) in place of (0, 1), so that a write can reflect the state (as in OLMo Hybrid)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Of the output norm: 1e-6 in Qwen3-Next, 1e-5 in OLMo Hybrid."""

    def build(self, width: int) -> GatedDeltaNet:
        return GatedDeltaNet(width, self)


class GatedDeltaNet(DeltaMixer):
    def __init__(self, width: int, config: GatedDeltaNetConfig):
        sizes = grouped_heads(config.heads, config.value_heads, config.head_dim, config.value_dim)
        super().__init__(width, sizes, config.conv_width, config.norm_eps, config.negative_eigenvalues)
        self.gate = nn.Linear(width, sizes.value_width, bias=False)
        self.gate_decay = config.gate_decay
        if self.gate_decay:
            self.flops_per_entry += 1.0
            self.decay = nn.Linear(width, sizes.value_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(sizes.value_heads))
            self.dt_bias = nn.Parameter(torch.empty(sizes.value_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gate_decay:
            draw_rates(self.A_log, 0.0)
            draw_steps(self.dt_bias)

    def log_decay(self, x: Tensor) -> Tensor | None:
        return gdn_gate(self.decay(x), self.A_log, self.dt_bias) if self.gate_decay else None

    def splits(self) -> dict[str, Split]:
        if not self.gate_decay:
            return super().splits()
        head = self.per_value_head()
        vectors = {"A_log": Split(0, (head,)), "dt_bias": Split(0, (head,))}
        return super().splits() | rows(self.decay, "decay", head) | vectors
