"""A run of a flattened parameter's elements, which is all that a ZeRO partition holds of it, as blocks of the whole tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parallel.layout import Box
from parallel.share import Share


class Fragment(Share):
    """`held`, of one dim and perhaps empty, is elements [start, start + held.numel()) of the whole tensor, flattened.

    Checkpoints read and write it in place like any Share, so no rank ever gathers what the others hold.
    """

    start: int

    @staticmethod
    def at(start: int, held: Tensor, shape: torch.Size, name: str) -> Fragment:
        """shape: of the whole tensor. name: for messages."""
        fragment = Tensor._make_wrapper_subclass(
            Fragment, shape, dtype=held.dtype, device=held.device, requires_grad=False
        )
        assert isinstance(fragment, Fragment)
        fragment.start, fragment.held, fragment.cuts, fragment.called = start, held, (), name
        return fragment

    def boxes(self) -> list[Box]:
        return runs(tuple(self.shape), self.start, self.start + self.held.numel())

    def block(self, box: Box) -> Tensor:
        return self.held.narrow(0, box.local[0], math.prod(box.sizes)).view(box.sizes)

    def fill(self, source: Tensor) -> None:
        """Copies from a whole tensor, or from a Fragment of the same elements."""
        if not isinstance(source, Fragment):
            self.held.copy_(source.flatten().narrow(0, self.start, self.held.numel()))
        elif source is not self:
            assert source.start == self.start and source.held.shape == self.held.shape, f"{self.called}: other elements"
            self.held.copy_(source.held)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Fragment.at(args[0].start, args[0].held.detach(), args[0].shape, args[0].called)
        return Share.__torch_dispatch__(func, types, args, kwargs)


def runs(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Elements [start, end) of a tensor, flattened, as blocks of it in order: fewer than two for each dim.

    A block's `local` is the place of its first element in the run.
    """
    if start >= end:
        return []
    if len(shape) == 0:
        return [Box((0,), (), (), 1)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    found = [Box((first * row - start,), (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), 1)]
    if first > last:  # all within one row
        found, broken = [], [(start, end)]
    else:
        found = found if first < last else []
        broken = [(start, first * row), (last * row, end)]
    for low, high in broken:
        for box in runs(shape[1:], low % row, low % row + high - low):
            found.append(Box((box.local[0] + low - start,), (low // row, *box.whole), (1, *box.sizes), 1))
    return sorted(found, key=lambda box: box.local)
