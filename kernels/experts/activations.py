"""The activations of the experts, each with its hand-written derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """forward(z) -> act(z); into(z, out): the same, written to out; backward(upstream, z, out): out = upstream * act'(z)."""

    forward: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]


def _relu(z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(z, 0.0, out=out)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        functional.silu,
        lambda z, out: _aten.silu.out(z, out=out),
        lambda d, z, out: _aten.silu_backward.grad_input(d, z, grad_input=out),
    ),
    "gelu": Activation(
        functional.gelu,
        lambda z, out: _aten.gelu.out(z, out=out),
        lambda d, z, out: _aten.gelu_backward.grad_input(d, z, grad_input=out),
    ),
    "gelu_tanh": Activation(
        lambda z: functional.gelu(z, approximate="tanh"),
        lambda z, out: _aten.gelu.out(z, approximate="tanh", out=out),
        lambda d, z, out: _aten.gelu_backward.grad_input(d, z, approximate="tanh", grad_input=out),
    ),
    "relu": Activation(
        functional.relu,
        _relu,
        lambda d, z, out: _aten.threshold_backward.grad_input(d, z, 0.0, grad_input=out),
    ),
    # Squared ReLU: So et al. 2021 (2109.08668).
    "relu2": Activation(
        lambda z: functional.relu(z).square(),
        lambda z, out: _relu(z, out).square_(),
        lambda d, z, out: _relu(z, out).mul_(d).mul_(2.0),
    ),
}
