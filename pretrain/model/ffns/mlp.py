"""The plain two-layer FFN (Vaswani et al. 2017): W_down act(W_up x), for comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.split import Section, SharedBias, Split, columns, rows
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda h: functional.relu(h).square(),
    "silu": functional.silu,
}


class MLPConfig(FFNConfig):
    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(ge=1)
    """Width of the hidden layer; usually four times the model's."""
    activation: Activation = "gelu"
    """relu2 is the squared ReLU (Primer, arXiv 2109.08668)."""
    bias: bool = False

    def build(self, width: int) -> MLP:
        return MLP(width, self)


class MLP(FFN):
    def __init__(self, width: int, config: MLPConfig):
        super().__init__()
        self.activation: Activation = config.activation
        self.up = nn.Linear(width, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_ACTIVATIONS[self.activation](self.up(x)))

    def flops_per_token(self, context: float) -> float:
        return linear_flops(self.up.weight, self.down.weight)

    def output_projections(self) -> list[Tensor]:
        return [self.down.weight]

    def splits(self) -> dict[str, Split]:
        hidden = Section.even(self.down.in_features, "hidden")
        return rows(self.up, "up", hidden) | columns("down", hidden)

    def shrink(self, rank: int, ranks: int) -> None:
        self.down = SharedBias(self.down, ranks)
