"""What a workload is: a shape, random inputs of that shape, and a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # tensors by the names of the public function's arguments; None where not given


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    B: int
    T: int
    H: int
    K: int
    V: int

    @staticmethod
    def parse(text: str) -> Shape:
        """B1T2048H4D128, or with K and V in place of D. Raises ValueError for anything else."""
        if not re.fullmatch(r"([BTHDKV]\d+)+", text):
            raise ValueError(f"{text!r} is not a shape; write B1T2048H4D128 (batch, tokens, heads, head dimension)")
        sizes = {letter: int(number) for letter, number in re.findall(r"([BTHDKV])(\d+)", text)}
        K, V = sizes.get("K", sizes.get("D", 0)), sizes.get("V", sizes.get("D", 0))
        shape = Shape(sizes.get("B", 1), sizes.get("T", 0), sizes.get("H", 1), K, V)
        if min(shape.B, shape.T, shape.H, K, V) < 1:
            raise ValueError(f"shape {text!r} lacks T or D, or has a size of 0; write for instance B1T2048H4D128")
        return shape

    def __str__(self) -> str:
        head = f"D{self.K}" if self.K == self.V else f"K{self.K}V{self.V}"
        return f"B{self.B}T{self.T}H{self.H}{head}"

    @property
    def tokens(self) -> int:
        return self.B * self.T


@dataclass(frozen=True)
class Workload:
    """One operator in one use.

    op: its folder in kernels/. inputs: (shape, dtype, device) -> arguments. call: the public function on them; returns
    the output whose gradient is taken.
    """

    name: str
    op: str
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    call: Callable[[Inputs], Tensor]


def leaves(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The inputs that want gradients, in order."""
    return [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]


def generator_of(device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, device=device, generator=generator)


def finish(inputs: Inputs) -> Inputs:
    """Without the generator; everything with a fraction wants a gradient."""
    inputs.pop("generator", None)
    return {name: _wanting(value) for name, value in inputs.items()}


def _wanting(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
