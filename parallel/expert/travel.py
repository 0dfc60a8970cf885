"""Transports with gradients, and rows that are on their way while something else is computed.

A departure and an arrival are two nodes of the autograd graph. The departure launches the messages and returns; what is computed
until the arrival runs meanwhile. In the backward pass the arrival comes first, so it is the one that launches (the gradients,
by the transport's other direction) and the departure waits: the same work overlaps there, since autograd runs the newest node
first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from parallel.expert.transport import Arrival, Transport


class Trip:
    """Two tensors with the same rows that travel together: tokens [P, D] and weights [P]."""

    def __init__(self, transport: Transport, tokens: Tensor, weights: Tensor):
        self.transport = transport
        self.under_way: list[Arrival] = []
        # The ticket stands for the rows in the autograd graph: until they arrive there is no tensor to show.
        self.ticket = _Depart.apply(self, tokens, weights)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Waits for the rows."""
        return _Arrive.apply(self, self.ticket)

    def launch_there(self, *rows: Tensor) -> None:
        self.under_way = [self.transport.there(x) for x in rows]

    def launch_back(self, *rows: Tensor) -> None:
        self.under_way = [self.transport.back(x) for x in rows]

    def wait(self) -> list[Tensor]:
        arrivals, self.under_way = self.under_way, []
        return [arrival() for arrival in arrivals]


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, tokens: Tensor, weights: Tensor) -> Tensor:
        ctx.trip = trip
        trip.launch_there(tokens, weights)
        return tokens.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.trip.wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return tuple(trip.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.launch_back(*gradients)
        return None, gradients[0].new_zeros(())


def back(transport: Transport, x: Tensor) -> Tensor:
    """x [rows worked on, D] -> [own rows, D] by transport.back; differentiable."""
    return _Back.apply(transport, x)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transport: Transport, x: Tensor) -> Tensor:
        ctx.transport = transport
        return transport.back(x)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.transport.there(dy)()


def copies(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """x [N, D] -> [N * k, D], k rows for each token in the order given; differentiable.

    order: int64 [N * k], the choice (token * k + j) that each row holds. position: int64 [N, k], its inverse.
    """
    return _Copies.apply(x, order, position)


def combined(rows: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """The adjoint of `copies`: rows [N * k, D] -> [N, D], the sum of each token's k rows; differentiable."""
    return _Combined.apply(rows, order, position)


def _spread(x: Tensor, order: Tensor, k: int) -> Tensor:
    return x.index_select(0, order // k)


def _sum(rows: Tensor, position: Tensor) -> Tensor:
    """A gather, so without atomics and in a fixed order; sums in fp32 at least."""
    if position.shape[0] == 0 or position.shape[1] == 1:
        return rows.index_select(0, position.reshape(-1))
    return embedding_bag(position, rows, mode="sum")


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return _spread(x, order, position.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        (position,) = ctx.saved_tensors
        return _sum(d_rows, position), None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = position.shape[1]
        return _sum(rows, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _spread(dy, order, ctx.k), None, None
