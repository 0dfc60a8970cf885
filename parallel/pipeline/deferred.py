"""Weight gradients put off, so that a zero-bubble schedule has work for its bubbles (Qi et al. 2023, arXiv 2401.10241).

torch can split a backward pass at the graph: first down to the inputs, then from kept nodes to the weights. That fails where a
weight is used twice on one path (pytorch issue 180952; since its mend, other weights' graphs are gone by then), and it runs every
operator with a backward of its own twice. Here the backward pass runs once, except that the weights of linear layers get no
gradient: what it takes is kept, and computed when the schedule says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.compilation import is_compiled


class WeightGradients:
    """The products that are still to be done, of the linear layers of one stage."""

    def __init__(self, module: nn.Module):
        """From now on the backward passes of `module` leave out its linear layers' weights.

        Raises ValueError for compiled modules, which would not call what is put in place here.
        """
        if is_compiled(module):
            raise ValueError(
                "mesh.pp_schedule=zbv puts weight gradients off, which compiled blocks cannot; "
                "use mesh.pp_schedule=interleaved, or do not compile"
            )
        self.waiting: list[Callable[[], None]] = []
        for child in module.modules():
            if type(child) is nn.Linear:
                child.forward = partial(self._linear, child)  # type: ignore[method-assign]

    def take(self) -> Callable[[], None]:
        """What waits since the last call, as one function that does it."""
        waiting, self.waiting = self.waiting, []

        def run() -> None:
            while waiting:
                waiting.pop()()  # and frees what it needed

        return run

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return functional.linear(x, weight, bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        y = _Deferred.apply(x.to(dtype), weight, self.waiting_for)
        return y if bias is None else y + bias.to(dtype)

    def waiting_for(self, weight: Tensor, x: Tensor, dy: Tensor) -> None:
        """Puts off the gradient of a weight [N, D]: dy [..., N]^T x [..., D]."""
        self.waiting.append(partial(_add_gradient, weight, x, dy))


class _Deferred(torch.autograd.Function):
    """x [..., D], weight [N, D] -> x weight^T in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, defer: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        # The parameter itself: where activations are computed again, what is saved comes back as another tensor, whose gradient
        # nobody would see.
        ctx.weight, ctx.defer = weight, defer
        return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        ctx.defer(weight, x, dy)
        return (dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None), None, None


@torch.no_grad()
def _add_gradient(weight: Tensor, x: Tensor, dy: Tensor) -> None:
    gradient = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
    if weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad += gradient
