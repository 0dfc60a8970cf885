"""Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3): a state space whose step, input and output depend on the token.

x, z = W_in u,   x = SiLU(conv(x)),   dt', B, C = W_x x,   dt = softplus(W_dt dt' + dt_bias)
h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t x_t  per channel and state,   y_t = C_t h_t + D x_t
out = W_o (y * SiLU(z))
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import selective_scan
from pretrain.model.linear_parts import draw_steps, draw_taps, wide
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.split import Section, SharedBias, Split, columns, rows
from pretrain.model.sublayer import Mixer, MixerConfig, linear_flops, require


class MambaConfig(MixerConfig):
    kind: Literal["mamba"] = "mamba"
    expand: float = Field(2.0, gt=0)
    """Inner channels as a multiple of the width."""
    state_dim: int = Field(16, ge=1)
    """States of each inner channel."""
    dt_rank: int | None = Field(None, ge=1)
    """Inner channels of the step size's projection; width / 16, rounded up, when left out."""
    conv_width: int = Field(4, ge=1)
    """Taps of the short convolution."""
    conv_bias: bool = True
    bias: bool = False
    """Biases in the projections in and out."""

    def build(self, width: int) -> Mamba:
        return Mamba(width, self)


class Mamba(Mixer):
    conv_bias: nn.Parameter | None

    def __init__(self, width: int, config: MambaConfig):
        super().__init__()
        self.inner, self.state_dim = round(config.expand * width), config.state_dim
        require(self.inner > 0, f"expand={config.expand} leaves no channel of width={width}; choose a larger one")
        self.dt_rank = config.dt_rank or math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=config.bias)
        self.conv = nn.Parameter(torch.empty(self.inner, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.inner)) if config.conv_bias else None
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * self.state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, self.state_dim))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, width, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        draw_taps(self.conv, self.conv_bias)
        draw_steps(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.init_weights(0.0)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The step's projection keeps the variance of its few inputs (section 3.6), whatever std the other weights have."""
        bound = self.dt_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: Cache = None) -> Tensor:
        mixed, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed = sequence.convolve(mixed, self.conv, self.conv_bias, cache=cache)
        dt, B, C = self.across(self.x_proj(mixed)).split((self.dt_rank, self.state_dim, self.state_dim), dim=-1)
        step = F.softplus(wide(self.dt_proj(dt)) + wide(self.dt_bias))
        A = -wide(self.A_log).exp()
        y = sequence.recur(selective_scan, mixed, step, A, B, C, wide(self.D), cache=cache)
        return self.out(y * F.silu(gate))

    def flops_per_token(self, context: float) -> float:
        dense = linear_flops(self.in_proj.weight, self.x_proj.weight, self.dt_proj.weight, self.out.weight)
        # Per state: dt A (1), decay (1), write (2), read (2); per channel: dt x (1), D x (2), the gate (1).
        return dense + 2.0 * self.conv.numel() + (6.0 * self.state_dim + 4.0) * self.inner

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def splits(self) -> dict[str, Split]:
        inner = Section.even(self.inner, "expand * width")
        by_channel = ("conv", "conv_bias", "dt_bias", "A_log", "D")
        vectors = {name: Split(0, (inner,)) for name in by_channel if getattr(self, name) is not None}
        projections = rows(self.in_proj, "in_proj", inner, inner) | rows(self.dt_proj, "dt_proj", inner)
        return projections | columns("x_proj", inner) | columns("out", inner) | vectors

    def shrink(self, rank: int, ranks: int) -> None:
        self.inner //= ranks
        self.out = SharedBias(self.out, ranks)
