"""The activations of a gated feed-forward, each with its hand-written derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """forward(gate) -> act(gate); backward(upstream, gate) -> upstream * act'(gate)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(functional.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda gate: functional.gelu(gate, approximate="tanh"),
        lambda upstream, gate: torch.ops.aten.gelu_backward(upstream, gate, approximate="tanh"),
    ),
    "relu": Activation(functional.relu, lambda upstream, gate: torch.ops.aten.threshold_backward(upstream, gate, 0.0)),
}
