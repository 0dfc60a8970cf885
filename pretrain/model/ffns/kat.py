"""KAT's grouped rational FFN, GR-KAN (Yang and Wang 2024, arXiv 2409.10594): learned activations before both products.

    y = W_2 phi_2(W_1 phi_1(x)),   phi(x) = (a_0 + a_1 x + .. + a_5 x^5) / (1 + |b_1 x + .. + b_4 x^4|)

phi_1 starts as the identity, phi_2 as a fit of a usual activation. Groups of neighbouring channels share their coefficients.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.rational import rational
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import FFN, FFNConfig, linear_flops, require

Start = Literal["identity", "silu", "gelu"]

# Least-squares fits of the function on [-6, 6]: largest error there 2.1e-4 (silu) and 3.8e-3 (gelu).
_STARTS: dict[Start, tuple[list[float], list[float]]] = {
    "identity": ([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "silu": (
        [6.92145e-05, 0.5, 0.249776, 0.0521622, 0.00535874, 0.000225077],
        [0.0, 0.104324, 0.0, 0.000450153],
    ),
    "gelu": (
        [-0.00373777, 0.5, 0.420327, 0.12619, 0.0159586, 0.000710022],
        [0.0, 0.25238, 0.0, 0.00142004],
    ),
}


class KATConfig(FFNConfig):
    kind: Literal["kat"] = "kat"
    hidden: int = Field(ge=1)
    """Width of the hidden layer; usually four times the model's."""
    groups: int = Field(8, ge=1)
    """Groups of channels with their own denominators; must divide the model's width and hidden."""
    shared_numerator: bool = True
    """One numerator for all groups, as in the released models; otherwise one a group."""
    start: Start = "silu"
    """What the second activation is fitted to at first; SiLU is also called Swish."""

    def build(self, width: int) -> KAT:
        return KAT(width, self)


class Rational(nn.Module):
    """One learned activation for x [..., D]. Coefficients are kept flat: vectors do not decay."""

    def __init__(self, groups: int, shared_numerator: bool, start: Start):
        super().__init__()
        self.groups, self.shared_numerator, self.start = groups, shared_numerator, start
        above, below = _STARTS[start]
        self.numerator = nn.Parameter(torch.empty((1 if shared_numerator else groups) * len(above)))
        self.denominator = nn.Parameter(torch.empty(groups * len(below)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter, start in zip((self.numerator, self.denominator), _STARTS[self.start]):
            parameter.view(-1, len(start)).copy_(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        above, below = _STARTS[self.start]
        return rational(x, self.numerator.view(-1, len(above)), self.denominator.view(-1, len(below)))

    @torch.no_grad()
    def second_moment(self) -> float:
        """E[phi(x)^2] for x ~ N(0, 1) and the initial coefficients."""
        x = torch.linspace(-10.0, 10.0, 4001, dtype=torch.float64, device="cpu")
        density = (x.square() / -2).exp() / math.sqrt(2 * math.pi)
        start = (torch.tensor([part], dtype=torch.float64, device="cpu") for part in _STARTS[self.start])
        return torch.trapezoid(rational(x[:, None], *start)[:, 0].square() * density, x).item()


class KAT(FFN):
    reads_wide = True

    def __init__(self, width: int, config: KATConfig):
        super().__init__()
        for name, channels in (("the model's width", width), ("hidden", config.hidden)):
            require(
                channels % config.groups == 0,
                f"groups={config.groups} does not divide {name}={channels}; choose a divisor of both",
            )
        self.first = Rational(config.groups, config.shared_numerator, "identity")
        self.up = nn.Linear(width, config.hidden, bias=False)
        self.second = Rational(config.groups, config.shared_numerator, config.start)
        self.down = nn.Linear(config.hidden, width, bias=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """KAT's own law, whatever std: the second moment of unit normal inputs passes through both products unchanged."""
        for activation, product in ((self.first, self.up), (self.second, self.down)):
            product.weight.normal_(0.0, (product.in_features * activation.second_moment()) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.second(self.up(self.first(x))))

    def flops_per_token(self, context: float) -> float:
        return linear_flops(self.up.weight, self.down.weight)

    def output_projections(self) -> list[Tensor]:
        return [self.down.weight]

    def splits(self) -> dict[str, Split]:
        groups = self.second.groups
        hidden = Section(self.down.in_features, groups, "groups")
        coefficients = {
            f"second.{name}": Split(0, (Section(parameter.numel(), groups, "groups"),))
            for name, parameter in self.second.named_parameters()
            if name == "denominator" or not self.second.shared_numerator
        }
        return rows(self.up, "up", hidden) | columns("down", hidden) | coefficients

    def shrink(self, rank: int, ranks: int) -> None:
        self.second.groups //= ranks
