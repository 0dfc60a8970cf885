"""SwiGLU (Shazeer 2020, arXiv 2002.05202): W_down (SiLU(W_gate x) * W_up x)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.model.sublayer import FFN, FFNConfig, linear_flops


class SwiGLUConfig(FFNConfig):
    kind: Literal["swiglu"] = "swiglu"
    hidden: int = Field(ge=1)
    """Width of the hidden layer; 8/3 of the model's width costs as much as a plain FFN of four times the width."""

    def build(self, width: int) -> SwiGLU:
        return SwiGLU(width, self.hidden)


class SwiGLU(FFN):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def flops_per_token(self, context: float) -> float:
        return linear_flops(self.gate_up.weight, self.down.weight)

    def output_projections(self) -> list[Tensor]:
        return [self.down.weight]
