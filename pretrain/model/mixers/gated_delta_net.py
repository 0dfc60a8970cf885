"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464): a linear-time mixer with a state per head.

    q, k, v = SiLU(conv(W x)),  q and k of unit length,  beta = sigmoid(W_b x),  g = -exp(A_log) softplus(W_a x + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    y = W_o (RMSNorm(o) * SiLU(W_g x))

Without `gate_decay` it is DeltaNet (arXiv 2406.06484) with an output gate.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import delta_rule, gated_rms_norm, short_convolution
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # the step sizes at initialisation, log-uniform (as in Mamba-2)
A_MAX = 16.0  # decay rates at initialisation are uniform in (0, A_MAX)


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
    """beta in (0, 2) in place of (0, 1), so that a write can reflect the state."""
    norm_eps: float = Field(1e-6, gt=0)

    def build(self, width: int) -> GatedDeltaNet:
        return GatedDeltaNet(width, self)


class GatedDeltaNet(Mixer):
    def __init__(self, width: int, config: GatedDeltaNetConfig):
        super().__init__()
        self.heads, self.value_heads = config.heads, config.value_heads or config.heads
        require(
            self.value_heads % self.heads == 0,
            f"value_heads={self.value_heads} is not a multiple of heads={self.heads}; choose a multiple",
        )
        self.head_dim, self.value_dim = config.head_dim, config.value_dim or config.head_dim
        self.gate_decay, self.norm_eps = config.gate_decay, config.norm_eps
        self.beta_scale = 2.0 if config.negative_eigenvalues else 1.0
        qk_width, v_width = self.heads * self.head_dim, self.value_heads * self.value_dim
        self.sections = (qk_width, qk_width, v_width)
        self.qkv = nn.Linear(width, sum(self.sections), bias=False)
        self.gate = nn.Linear(width, v_width, bias=False)
        self.beta = nn.Linear(width, self.value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.sections), config.conv_width))
        self.norm = nn.Parameter(torch.ones(self.value_dim))
        self.out = nn.Linear(v_width, width, bias=False)
        if self.gate_decay:
            self.decay = nn.Linear(width, self.value_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.value_heads))
            self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.conv.shape[1])  # what torch's Conv1d draws for a depthwise kernel
        self.conv.uniform_(-bound, bound)
        if self.gate_decay:
            self.A_log.uniform_(0.0, A_MAX).clamp_(min=1e-4).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_().clamp_(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        state = cache if cache is not None else {}
        mixed, conv_state = short_convolution(
            self.qkv(x),
            self.conv,
            activation="silu",
            initial_state=state.get("conv"),
            output_final_state=cache is not None,
            cu_seqlens=sequence.cu_seqlens,
        )
        q, k, v = mixed.split(self.sections, dim=-1)
        o, memory = delta_rule(
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.heads, self.head_dim)),
            v.unflatten(-1, (self.value_heads, self.value_dim)),
            torch.sigmoid(self.beta(x).float()) * self.beta_scale,
            self._log_decay(x),
            initial_state=state.get("memory"),
            output_final_state=cache is not None,
            cu_seqlens=sequence.cu_seqlens,
            normalize_qk=True,
        )
        if cache is not None:
            cache["conv"], cache["memory"] = conv_state, memory
        gate = self.gate(x).unflatten(-1, (self.value_heads, self.value_dim))
        return self.out(gated_rms_norm(o, gate, self.norm, self.norm_eps).flatten(-2))

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """g [B, T, HV] in fp32, natural logarithm of the decay, <= 0; None for the plain delta rule."""
        if not self.gate_decay:
            return None
        return -self.A_log.float().exp() * F.softplus(self.decay(x).float() + self.dt_bias.float())

    def flops_per_token(self, context: float) -> float:
        weights = [self.qkv.weight, self.gate.weight, self.beta.weight, self.out.weight]
        weights += [self.decay.weight] if self.gate_decay else []
        # The recurrence itself: decay (1), k^T S (2), rank-one write (2), q^T S (2) per state entry. A chunked form does a
        # few more matmul FLOPs; counting the definition keeps MFU comparable between forms.
        state = 7.0 * self.value_heads * self.head_dim * self.value_dim
        return linear_flops(*weights) + 2.0 * self.conv.numel() + state

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]
