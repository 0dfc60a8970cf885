"""Kimi Delta Attention (Kimi Linear 2025, arXiv 2510.26692): Gated DeltaNet that forgets each key channel by itself.

q, k, v = SiLU(conv(W x)),  q and k of unit length,  beta = sigmoid(W_b x)
g = -exp(A_log) softplus(W_up W_down x + dt_bias)  per channel;  with safe_gate, lower_bound sigmoid(exp(A_log) (...))
S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
y = W_o (RMSNorm(o) * sigmoid(W_up' W_down' x))
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.gated_linear_attention.members import kda_gate, kda_safe_gate
from pretrain.model.linear_parts import DeltaMixer, LowRank, draw_rates, draw_steps, grouped_heads, last_rows
from pretrain.model.split import Split
from pretrain.model.sublayer import MixerConfig


class KimiDeltaAttentionConfig(MixerConfig):
    kind: Literal["kda"] = "kda"
    heads: int = Field(ge=1)
    """Query/key heads."""
    value_heads: int | None = Field(None, ge=1)
    """Value heads, a multiple of heads; the same number when left out. Each has its own state, gates and beta."""
    head_dim: int = Field(128, ge=1)
    """Channels of a query/key head."""
    value_dim: int | None = Field(None, ge=1)
    """Channels of a value head; head_dim when left out."""
    rank: int | None = Field(None, ge=1)
    """Inner channels of the decay and of the output gate; head_dim when left out."""
    conv_width: int = Field(4, ge=1)
    """Taps of the short convolution on q, k and v."""
    safe_gate: bool = False
    """A log decay bounded by lower_bound, which GPU kernels can factor into matrix products within a chunk."""
    lower_bound: float = Field(-5.0, lt=0)
    """The most that the safe gate forgets in one step, in nats."""
    output_gate_bias: bool = False
    """A bias in the output gate's second projection (as in flash-linear-attention)."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) in place of (0, 1), so that a write can reflect the state."""
    norm_eps: float = Field(1e-5, gt=0)

    def build(self, width: int) -> KimiDeltaAttention:
        return KimiDeltaAttention(width, self)


class KimiDeltaAttention(DeltaMixer):
    gate_activation = "sigmoid"
    flops_per_entry = 7.0  # the delta rule (6) and the decay (1)

    def __init__(self, width: int, config: KimiDeltaAttentionConfig):
        sizes = grouped_heads(config.heads, config.value_heads, config.head_dim, config.value_dim)
        super().__init__(width, sizes, config.conv_width, config.norm_eps, config.negative_eigenvalues)
        rank, decays = config.rank or config.head_dim, sizes.value_heads * sizes.key
        self.gate = LowRank(width, rank, sizes.value_width, config.output_gate_bias)
        self.decay = LowRank(width, rank, decays)
        self.A_log = nn.Parameter(torch.empty(sizes.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.safe_gate, self.lower_bound = config.safe_gate, config.lower_bound
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.safe_gate:
            self.A_log.zero_()  # a slope of 1
        else:
            draw_rates(self.A_log, 1.0)
        draw_steps(self.dt_bias)

    def log_decay(self, x: Tensor) -> Tensor:
        a = self.decay(x).unflatten(-1, (self.value_heads, self.head_dim))
        if self.safe_gate:
            return kda_safe_gate(a, self.A_log, self.dt_bias, self.lower_bound)
        return kda_gate(a, self.A_log, self.dt_bias)

    def splits(self) -> dict[str, Split]:
        head, channels = self.per_value_head(), self.per_value_head(self.head_dim)
        vectors = {"A_log": Split(0, (head,)), "dt_bias": Split(0, (channels,))}
        return super().splits() | last_rows(self.decay, "decay", channels) | vectors
