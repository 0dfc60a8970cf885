"""Hourglass FFN (Liao et al. 2026, arXiv 2602.06471): a stack of narrow SwiGLU sub-MLPs, each with its own norm and residual.

    h_0 = x,   h_{i+1} = h_i + SwiGLU_i(RMSNorm_i(h_i)),   i = 0 .. K-1

The stack replaces the block's norm and residual: its first norm is the pre-norm, its own skip is the block's skip. One sub-MLP
of the usual width is exactly the usual pre-norm SwiGLU sublayer.

With `lift` (Chen et al. 2025, arXiv 2510.01796) the stack's skip runs at a wider width, reached through a fixed random matrix:

    h_0 = W_in x,   y = x + W_out (h_K - h_0)

The paper's layer is y = W_out h_K; only what the stack added is brought back here, so that the residual stream stays whole.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.norm import RMSNorm
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops, require

Width = Annotated[int, Field(ge=1)]


class HourglassConfig(FFNConfig):
    kind: Literal["hourglass"] = "hourglass"
    hidden: Width | Annotated[list[Width], Field(min_length=1)]
    """Width of each sub-MLP, narrower than the model, or a list with one width for each. The sum of all widths equals the
    width of a SwiGLU of the same cost."""
    depth: int | None = Field(None, ge=1)
    """Sub-MLPs in the stack. When left out: 4, or as many as hidden lists."""
    norm_eps: float = Field(1e-6, gt=0)
    lift: int | None = Field(None, ge=1)
    """Width of the stack's own skip, usually above the model's; None runs the stack at the model's width. The matrix that
    leads there stays as it was drawn: saved, but not trained."""

    def widths(self) -> list[int]:
        """The hidden width of each sub-MLP. Raises ValueError when depth contradicts the list."""
        if isinstance(self.hidden, int):
            return [self.hidden] * (4 if self.depth is None else self.depth)
        require(
            self.depth is None or self.depth == len(self.hidden),
            f"depth={self.depth}, but hidden lists {len(self.hidden)} widths; leave depth out, or make them agree",
        )
        return self.hidden

    def build(self, width: int) -> Hourglass:
        return Hourglass(width, self)


class Hourglass(FFN):
    owns_residual = True
    lift: Tensor | None
    """fp32 [Dz, D]: saved with the model, never trained."""

    def __init__(self, width: int, config: HourglassConfig):
        super().__init__()
        widths, inner = config.widths(), width if config.lift is None else config.lift
        self.norms = nn.ModuleList(RMSNorm(inner, config.norm_eps) for _ in widths)
        self.stack = nn.ModuleList(SwiGLU(inner, hidden) for hidden in widths)
        self.register_buffer("lift", None if config.lift is None else torch.empty(inner, width))
        self.project = None if config.lift is None else nn.Linear(inner, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the lift so that it keeps the mean square of a channel."""
        if self.lift is not None:
            self.lift.normal_(0.0, self.lift.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.lift is None or self.project is None:
            return self._run(x)
        # Back to the stream's dtype: under autocast the product is bf16, and a stack of residuals should not be.
        start = functional.linear(x, self.lift.to(x.dtype)).to(x.dtype)
        return x + self.project(self._run(start) - start)

    def _run(self, h: Tensor) -> Tensor:
        for norm, ffn in zip(self.norms, self.stack):
            h = h + ffn(norm(h))
        return h

    def flops_per_token(self, context: float) -> float:
        stack = sum(ffn.flops_per_token(context) for ffn in self._parts())
        if self.lift is None or self.project is None:
            return stack
        return stack + linear_flops(self.lift, self.project.weight)

    def output_projections(self) -> list[Tensor]:
        if self.project is not None:
            return [self.project.weight]
        return [ffn.down.weight for ffn in self._parts()]

    def _parts(self) -> list[SwiGLU]:
        return [part for part in self.stack if isinstance(part, SwiGLU)]
