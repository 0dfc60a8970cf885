"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7): a state space with one decay per head.

    z, (x, B, C), dt = W_in u,   x, B, C = SiLU(conv(x, B, C)),   dt = softplus(dt + dt_bias) within dt_limits
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t,   out = W_o RMSNorm(y * SiLU(z))

Heads share B and C within a group, and the norm works on a group's channels. `in_proj` holds the rows of z, x, B, C, dt.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels import gated_linear_attention, gated_rms_norm
from kernels.gated_linear_attention.members import mamba2_step_size, ssd
from pretrain.model.linear_parts import draw_rates, draw_steps, draw_taps, wide
from pretrain.model.norm import norm_of_part
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.split import Section, SharedBias, Split, columns, rows
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require


class Mamba2Config(MixerConfig):
    kind: Literal["mamba2"] = "mamba2"
    expand: float = Field(2.0, gt=0)
    """Inner channels as a multiple of the width."""
    head_dim: int = Field(64, ge=1)
    """Channels of a head, a divisor of the inner channels."""
    state_dim: int = Field(128, ge=1)
    """Channels of B and C: the size of the state for each inner channel."""
    groups: int = Field(1, ge=1)
    """Groups of heads with their own B and C, a divisor of the number of heads."""
    conv_width: int = Field(4, ge=1)
    """Taps of the short convolution on x, B and C."""
    conv_bias: bool = True
    bias: bool = False
    """Biases in the projections in and out."""
    norm_first: bool = False
    """Normalise before the gate multiplies, in place of after."""
    dt_limits: tuple[float, float] | None = None
    """Smallest and largest step size; unbounded when left out."""
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _limits_in_order(self) -> Mamba2Config:
        if self.dt_limits is not None and not 0.0 <= self.dt_limits[0] < self.dt_limits[1]:
            raise ValueError(f"dt_limits={self.dt_limits} must be two rising numbers of at least 0")
        return self

    def build(self, width: int) -> Mamba2:
        return Mamba2(width, self)


class Mamba2(Mixer):
    conv_bias: nn.Parameter | None

    def __init__(self, width: int, config: Mamba2Config):
        super().__init__()
        inner = round(config.expand * width)
        self.head_dim, self.state_dim, self.groups = config.head_dim, config.state_dim, config.groups
        require(
            inner % self.head_dim == 0 and inner > 0,
            f"head_dim={self.head_dim} does not divide expand * width = {inner}; choose a divisor",
        )
        self.heads = inner // self.head_dim
        require(
            self.heads % self.groups == 0,
            f"groups={self.groups} does not divide the {self.heads} heads (expand * width / head_dim); choose a divisor",
        )
        shared = self.groups * self.state_dim
        self.inner, self.sections = inner, (inner, shared, shared)
        self.norm_width = inner // self.groups  # channels normalised together; a part may hold fewer
        self.all_groups, self.first_group = self.groups, 0  # in a part: where its groups begin among all
        self.norm_first, self.norm_eps = config.norm_first, config.norm_eps
        self.dt_limits = config.dt_limits or (0.0, math.inf)
        self.in_proj = nn.Linear(width, inner + sum(self.sections) + self.heads, bias=config.bias)
        self.conv = nn.Parameter(torch.empty(sum(self.sections), config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.sections))) if config.conv_bias else None
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_taps(self.conv, self.conv_bias)
        draw_rates(self.A_log, 1.0)
        draw_steps(self.dt_bias)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: Cache = None) -> Tensor:
        gate, mixed, dt = self.in_proj(x).split((self.inner, sum(self.sections), self.heads), dim=-1)
        mixed = sequence.convolve(mixed, self.conv, self.conv_bias, cache=cache)
        values, B, C = mixed.split(self.sections, dim=-1)
        values = values.unflatten(-1, (self.heads, self.head_dim))
        step = mamba2_step_size(dt, self.dt_bias, self.dt_limits)
        B, C = (part.unflatten(-1, (self.groups, self.state_dim)) for part in (B, C))
        q, k, v, g, scale = ssd(values, step, -wide(self.A_log).exp(), B, C)
        y = sequence.recur(gated_linear_attention, q, k, v, g, cache=cache, scale=scale)
        y = (wide(y) + wide(self.D)[:, None] * wide(values)).to(y.dtype)
        return self.out(self._gated_norm(y.flatten(-2), gate))

    def _gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.inner < self.norm_width:
            return self._norm_of_part(y, gate)
        if self.groups == 1:
            return gated_rms_norm(y, gate, self.norm, self.norm_eps, norm_first=self.norm_first)
        # The operator knows one weight for every row, and here each group has its own: it multiplies afterwards.
        shape = (self.groups, -1)
        ones = torch.ones(self.inner // self.groups, dtype=self.norm.dtype, device=y.device)
        y = gated_rms_norm(
            y.unflatten(-1, shape), gate.unflatten(-1, shape), ones, self.norm_eps, norm_first=self.norm_first
        )
        return (wide(y).flatten(-2) * self.norm).to(y.dtype)

    def _norm_of_part(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated norm where this module holds a part of one group's channels."""

        def of_group(square: Tensor) -> Tensor:
            # Every part adds to its own group's sum.
            group = torch.arange(self.all_groups, device=square.device) == self.first_group
            return self.across(square * group)[..., self.first_group, None]

        h, act = wide(y), F.silu(wide(gate))
        if not self.norm_first:
            h = h * act
        h = norm_of_part(h, self.norm, self.norm_eps, self.norm_width, of_group)
        return (h * act if self.norm_first else h).to(y.dtype)

    def flops_per_token(self, context: float) -> float:
        # Per state entry: decay (1), write (2), read (2); per inner channel: dt x (1), D x (2).
        state = 5.0 * self.inner * self.state_dim + 3.0 * self.inner
        return linear_flops(self.in_proj.weight, self.out.weight) + 2.0 * self.conv.numel() + state

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def splits(self) -> dict[str, Split]:
        head = Section(self.heads, self.heads, "heads (expand * width / head_dim)")
        inner = head.of(self.inner)
        shared = Section(self.sections[1], self.groups, "groups", shared=self.groups < self.heads)
        mixed = (inner, shared, shared)
        splits = rows(self.in_proj, "in_proj", inner, *mixed, head) | columns("out", inner)
        splits |= {"conv": Split(0, mixed)} | ({} if self.conv_bias is None else {"conv_bias": Split(0, mixed)})
        return splits | {name: Split(0, (head,)) for name in ("A_log", "dt_bias", "D")} | {"norm": Split(0, (inner,))}

    def shrink(self, rank: int, ranks: int) -> None:
        self.first_group = rank * self.groups // ranks
        self.heads, self.inner, self.groups = self.heads // ranks, self.inner // ranks, max(1, self.groups // ranks)
        shared = self.groups * self.state_dim
        self.sections = (self.inner, shared, shared)
        self.out = SharedBias(self.out, ranks)
