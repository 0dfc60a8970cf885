"""Hourglass FFN (Liao et al. 2026, arXiv 2602.06471): a stack of narrow SwiGLU sub-MLPs, each with its own norm and residual.

    h_0 = x,   h_{i+1} = h_i + SwiGLU_i(RMSNorm_i(h_i)),   i = 0 .. K-1

The stack replaces the block's norm and residual: its first norm is the pre-norm, its own skip is the block's skip. One sub-MLP
of the usual width is exactly the usual pre-norm SwiGLU sublayer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.norm import RMSNorm
from pretrain.model.sublayer import FFN, FFNConfig


class HourglassConfig(FFNConfig):
    kind: Literal["hourglass"] = "hourglass"
    hidden: int = Field(ge=1)
    """Width of each sub-MLP, narrower than the model; depth * hidden equals the width of a SwiGLU of the same cost."""
    depth: int = Field(4, ge=1)
    """Sub-MLPs in the stack."""
    norm_eps: float = Field(1e-6, gt=0)

    def build(self, width: int) -> Hourglass:
        return Hourglass(width, self)


class Hourglass(FFN):
    owns_residual = True

    def __init__(self, width: int, config: HourglassConfig):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width, config.norm_eps) for _ in range(config.depth))
        self.stack = nn.ModuleList(SwiGLU(width, config.hidden) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, ffn in zip(self.norms, self.stack):
            x = x + ffn(norm(x))
        return x

    def flops_per_token(self, context: float) -> float:
        return sum(ffn.flops_per_token(context) for ffn in self._parts())

    def output_projections(self) -> list[Tensor]:
        return [ffn.down.weight for ffn in self._parts()]

    def _parts(self) -> list[SwiGLU]:
        return [part for part in self.stack if isinstance(part, SwiGLU)]
