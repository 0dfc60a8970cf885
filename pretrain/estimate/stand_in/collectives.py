"""Exchanges between neighbours that exchange nothing: they make tensors of the right sizes and take down the messages, in both
directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.estimate.stand_in.notes import Notes, size


class Travel(torch.autograd.Function):
    """Rows and weights to the ranks that hold their experts, as many as come from there."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, axis: str, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.notes, ctx.like = notes, (rows.shape, weights.shape)
        notes.send("ep", "all_to_all", "experts' tokens", size(rows), hidden=True)
        notes.send("ep", "all_to_all", "weights", size(weights), hidden=True)
        return torch.empty_like(rows), torch.empty_like(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dweights: Tensor) -> Any:
        ctx.notes.send("ep", "all_to_all", "gradients of experts' tokens", size(drows), hidden=True)
        ctx.notes.send("ep", "all_to_all", "gradients of weights", size(dweights), hidden=True)
        return None, None, torch.empty_like(drows), torch.empty_like(dweights)


class Return(torch.autograd.Function):
    """Results home; the gradients go there."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, rows: Tensor) -> Tensor:
        ctx.notes = notes
        notes.send("ep", "all_to_all", "experts' results", size(rows))
        return torch.empty_like(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("ep", "all_to_all", "gradients of experts' results", size(dy))
        return None, torch.empty_like(dy)


class Join(torch.autograd.Function):
    """Tokens and weights of all tp ranks, for experts that are cut over tp."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.notes, ctx.ranks = notes, ranks
        notes.send("tp", "all_gather", "experts' tokens", ranks * size(tokens), hidden=True)
        notes.send("tp", "all_gather", "weights", ranks * size(weights), hidden=True)
        many = (ranks * tokens.shape[0], *tokens.shape[1:]), (ranks * weights.shape[0], *weights.shape[1:])
        return tokens.new_empty(many[0]), weights.new_empty(many[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor, dweights: Tensor) -> Any:
        ctx.notes.send("tp", "reduce_scatter", "gradients of experts' tokens", size(dtokens), hidden=True)
        ctx.notes.send("tp", "reduce_scatter", "gradients of weights", size(dweights), hidden=True)
        rows = dtokens.shape[0] // ctx.ranks
        return None, None, dtokens.new_empty(rows, *dtokens.shape[1:]), dweights.new_empty(rows, *dweights.shape[1:])


class Share(torch.autograd.Function):
    """x [ranks * n, ...] of parts -> this rank's n rows of the sum. In `Tokens` form [B, T, D], along T."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, x: Tensor, what: str) -> Tensor:
        ctx.notes, ctx.ranks, ctx.what, ctx.dim = notes, ranks, what, 1 if x.dim() == 3 else 0
        notes.send("tp", "reduce_scatter", what, size(x))
        shape = list(x.shape)
        shape[ctx.dim] //= ranks
        return x.new_empty(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "all_gather", f"gradients of {ctx.what}", ctx.ranks * size(dy))
        shape = list(dy.shape)
        shape[ctx.dim] *= ctx.ranks
        return None, None, dy.new_empty(shape), None


class Gather(torch.autograd.Function):
    """x [B, T / ranks, D] -> [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, notes: Notes, ranks: int, x: Tensor) -> Tensor:
        ctx.notes, ctx.ranks = notes, ranks
        notes.send("tp", "all_gather", "tokens", ranks * size(x))
        return x.new_empty(x.shape[0], ranks * x.shape[1], *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "reduce_scatter", "gradients of tokens", size(dy))
        return None, None, dy.new_empty(dy.shape[0], dy.shape[1] // ctx.ranks, *dy.shape[2:])


class Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, notes: Notes, x: Tensor) -> Tensor:
        ctx.notes = notes
        notes.send("tp", "all_reduce", "sums within a unit", size(x))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.notes.send("tp", "all_reduce", "gradients of sums within a unit", size(dy))
        return None, torch.empty_like(dy)
