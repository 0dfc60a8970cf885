"""Gated linear units (Shazeer 2020, arXiv 2002.05202): W_down (act(W_gate x) * W_up x), and two kinds of them.

GEGLU gates with GELU; the bilinear layer has no nonlinearity in the gate (arXiv 2410.08417): f(c x) = c^2 f(x), so keep a norm
before it. SwiGLU has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels import swiglu
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops

Activation = Literal["silu", "gelu", "gelu_tanh", "identity"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "identity": lambda gate: gate,
}


class GLU(FFN):
    """gate_up.weight [2F, D]: the gate's rows first, then up's. down.weight [D, F]."""

    def __init__(self, width: int, hidden: int, activation: Activation):
        super().__init__()
        self.activation: Activation = activation
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation))

    def flops_per_token(self, context: float) -> float:
        return linear_flops(self.gate_up.weight, self.down.weight)

    def output_projections(self) -> list[Tensor]:
        return [self.down.weight]

    def splits(self) -> dict[str, Split]:
        hidden = Section.even(self.down.in_features, "hidden")
        return rows(self.gate_up, "gate_up", hidden, hidden) | columns("down", hidden)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """[..., 2F], gate first -> act(gate) * up [..., F]."""
    if activation == "silu":
        return swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


class GEGLUConfig(FFNConfig):
    kind: Literal["geglu"] = "geglu"
    hidden: int = Field(ge=1)
    """Width of the hidden layer."""
    tanh: bool = False
    """The tanh approximation of GELU, as in Gemma."""

    def build(self, width: int) -> GLU:
        return GLU(width, self.hidden, "gelu_tanh" if self.tanh else "gelu")


class BilinearConfig(FFNConfig):
    kind: Literal["bilinear"] = "bilinear"
    hidden: int = Field(ge=1)
    """Width of the hidden layer."""

    def build(self, width: int) -> GLU:
        return GLU(width, self.hidden, "identity")
