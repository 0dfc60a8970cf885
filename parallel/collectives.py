"""Collectives that gradients flow through, in both directions the ones that fit together.

    forward             backward            use
    all_gather          reduce_scatter      every rank needs all parts
    reduce_scatter      all_gather          partial sums become parts of the sum
    all_reduce          identity            partial sums become the sum, which all ranks go on with alike (Megatron's g)
    copy (identity)     all_reduce          all ranks go on with the same tensor, each differently (Megatron's f)
    all_to_all          all_to_all          rows change owners

The convention behind the table: what is differentiated is the sum of all ranks' losses, except behind all_reduce, where
ranks hold the same loss and it counts once. Source: Shoeybi et al. 2019 (arXiv:1909.08053, section 3) and Korthikanti et al. 2022
(arXiv:2205.05198, section 4.2).

group None stands for a group of one rank: every function is then the identity. All ranks of a group make the same calls
in the same order, in the backward pass too: an output that one rank leaves out of its loss stops the others (see `beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None

# New names of the same functions; the old ones warn from torch 2.13 on.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The ranks' parts x, all of one shape, joined along dim in rank order."""
    return x if group is None else _apply(_AllGather, x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part, along dim, of the sum of the ranks' x. Raises ValueError where the ranks do not divide dim's size."""
    return x if group is None else _apply(_ReduceScatter, x, dim, group)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x. Its gradient, the same on all ranks, goes on to each part unchanged."""
    return x if group is None else _apply(_AllReduce, x, group)


def copy(x: Tensor, group: Group) -> Tensor:
    """x, which is the same on all ranks. Its gradient is the sum of the ranks' gradients."""
    return x if group is None else _apply(_Copy, x, group)


def all_to_all(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: Group) -> Tensor:
    """Sends the first send_counts[0] rows of x [N, ...] to rank 0, the next to rank 1, and so on.

    Returns the rows received [sum(receive_counts), ...], in the order of the ranks they come from.
    """
    if group is None:
        return x
    return _apply(_AllToAll, x, tuple(send_counts), tuple(receive_counts), group)


def beside(kept: Tensor, sent: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(kept, all ranks' `sent` joined along dim 0): an all_gather whose backward runs on every rank that uses either output.

    For outputs that some ranks need and others do not: without a use on one rank, its backward would leave out a collective that
    the others wait in. So hang it on a tensor that every rank's loss depends on.
    """
    if group is None:
        return kept, sent
    kept, gathered = _apply(_Beside, kept, sent, group)
    return kept, gathered


def gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """all_gather without a gradient: for integers, and inside hand-written backwards."""
    first = x.movedim(dim, 0).contiguous()
    whole = first.new_empty(dist.get_world_size(group) * first.shape[0], *first.shape[1:])
    _gather(whole, first, group=group)
    return whole.movedim(0, dim)


def scattered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """reduce_scatter without a gradient."""
    ranks = dist.get_world_size(group)
    if x.shape[dim] % ranks:
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} cannot be cut into {ranks} equal parts; choose a multiple of {ranks}"
        )
    first = x.movedim(dim, 0).contiguous()
    part = first.new_empty(first.shape[0] // ranks, *first.shape[1:])
    _reduce(part, first, group=group)
    return part.movedim(0, dim)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """all_reduce without a gradient; x stays as it is."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def exchanged(x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """all_to_all without a gradient."""
    if sum(send) != x.shape[0]:
        raise ValueError(f"send_counts add up to {sum(send)}, but x has {x.shape[0]} rows")
    rows = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), list(receive), list(send), group=group)
    return rows


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return scattered(dy, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return scattered(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(dy, ctx.dim, ctx.group), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return summed(dy, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchanged(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(dy, ctx.receive, ctx.send, ctx.group), None, None, None


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return kept.view_as(kept), gathered(sent, 0, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkept: Tensor, dgathered: Tensor) -> tuple[Tensor | None, ...]:
        return dkept, scattered(dgathered, 0, ctx.group), None  # autograd hands zeros for an output without a use


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)
