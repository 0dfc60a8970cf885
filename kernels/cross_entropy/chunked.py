"""The head's loss a chunk of tokens at a time, its logits turned into their own gradient in place.

With reduction "sum" or "mean" every token's upstream gradient is the same number, so the forward already knows the
gradients up to that factor: it accumulates them while the logits are there, and the backward is a scaling. With "none"
the forward keeps only losses, and the backward computes the logits again, each token's upstream gradient folded in.

Two sizes of work: a chunk of tokens makes the matrix products efficient; what is done to its logits between the products is
in logits.py (plain torch) and triton.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy.logits import Shard, Terms, TokenLosses, token_losses, wide_dtype

CHUNK_LOGITS = 1 << 25  # logits held at a time (64 MiB in bf16) where a chunk of 256 to 1024 tokens allows it
# Entries of the weight's gradient that a product in low precision fills before they are added up; on a CPU they stay in the
# second-level cache, widened, while that is done.
SLICE, SLICE_CPU = 1 << 24, 1 << 20


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    reduction: str,
    chunk: int | None,
    shard: Shard | None = None,
    losses: TokenLosses = token_losses,
) -> Tensor:
    """The loss; see kernels.cross_entropy.linear_cross_entropy. losses: what turns logits into losses and gradients."""
    chunk = chunk or default_chunk(x.shape[0], weight.shape[0])
    head = _Head(ignore_index, Terms(z_loss, label_smoothing), chunk, shard, losses)
    if reduction == "none":
        per_token: Tensor = _PerToken.apply(x, weight, bias, targets, head)
        return per_token
    loss: Tensor = _Reduced.apply(x, weight, bias, targets, head, reduction == "mean", torch.is_grad_enabled())
    return loss


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens a chunk: 1024, fewer for vocabularies above 32768 but not below 256; all chunks of nearly one size."""
    most = max(256, min(1024, CHUNK_LOGITS // vocabulary))
    return max(1, math.ceil(tokens / math.ceil(max(tokens, 1) / most)))


@dataclass
class _Gradients:
    """Of the summed losses: x's in x's dtype, the parameters' summed over chunks in fp32 or wider; None if not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> _Gradients:
        wide = wide_dtype(x)
        return cls(
            torch.empty_like(x) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=wide, device=x.device) if wanted[1] else None,
            torch.zeros(bias.shape, dtype=wide, device=x.device) if bias is not None and wanted[2] else None,
        )

    def add(self, x: Tensor, weight: Tensor, logits: Tensor, tokens: slice) -> None:
        """A chunk's share, of the gradient that its logits [C, V] have become."""
        if self.x is not None:
            torch.mm(logits, weight, out=self.x[tokens])
        if self.weight is not None:
            add_product(self.weight, logits, x[tokens])
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)


def add_product(total: Tensor, logits: Tensor, x: Tensor) -> None:
    """total [V, D] += logits^T x, of logits [C, V] and x [C, D], which may be of a lower precision than total."""
    if total.dtype == x.dtype:
        total.addmm_(logits.T, x)
        return
    # The product comes in low precision: by slices of rows, so that there is never a second tensor of the weight's size.
    V, D = total.shape
    height = max(1, min(V, (SLICE_CPU if x.device.type == "cpu" else SLICE) // D))
    product = torch.empty(height, D, dtype=x.dtype, device=x.device)
    for a in range(0, V, height):
        rows = slice(a, min(a + height, V))
        total[rows] += torch.mm(logits[:, rows].T, x, out=product[: rows.stop - a])


@dataclass(frozen=True)
class _Head:
    """The loss without its tensors: options and the walk over chunks."""

    ignore_index: int
    terms: Terms
    chunk: int
    shard: Shard | None
    losses: TokenLosses

    def walk(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: Tensor | None,
        gradients: _Gradients | None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """(tokens, losses in fp32 or wider) of each chunk; adds factor [N] times a token's gradient to `gradients`.

        weight: already in x's dtype. factor: 1 for every token when None. Ignored tokens have loss 0 and factor 0.
        """
        N, V = x.shape[0], weight.shape[0]
        kept = targets != self.ignore_index
        safe = torch.where(kept, targets, 0)
        factor = kept.to(wide_dtype(x)) if factor is None else torch.where(kept, factor, 0.0)
        # One buffer for all chunks: fresh ones would cost more in page faults than the softmax costs in arithmetic.
        buffer = torch.empty(min(self.chunk, N), V, dtype=x.dtype, device=x.device)
        for a in range(0, N, self.chunk):
            tokens = slice(a, min(a + self.chunk, N))
            logits = buffer[: tokens.stop - a]
            torch.mm(x[tokens], weight.T, out=logits)
            learn = gradients is not None
            losses = self.losses(logits, bias, safe[tokens], factor[tokens], self.terms, learn, self.shard)
            if gradients is not None:
                gradients.add(x, weight, logits, tokens)
            yield tokens, torch.where(kept[tokens], losses, 0.0)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        mean: bool,
        learn: bool,
    ) -> Tensor:
        gradients = _Gradients.zeros(x, weight, bias, ctx.needs_input_grad) if learn else None
        total = torch.zeros((), dtype=wide_dtype(x), device=x.device)
        for _, losses in head.walk(x, weight.to(x.dtype), bias, targets, None, gradients):
            total += losses.sum()
        share = torch.ones_like(total)
        if mean:
            share /= (targets != head.ignore_index).sum().clamp(min=1)
        if gradients is not None:
            ctx.save_for_backward(gradients.x, gradients.weight, gradients.bias, share)
            ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *summed, share = ctx.saved_tensors
        factor = upstream * share
        grads = (None if g is None else scaled(g, factor).to(dtype) for g, dtype in zip(summed, ctx.dtypes))
        return (*grads, None, None, None, None)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, in a backward: in place, unless the graph is retained and a second one must find what was saved."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or keeps():
        return gradient * factor
    return gradient.mul_(factor)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> Tensor:
        losses = torch.empty(x.shape[0], dtype=wide_dtype(x), device=x.device)
        for tokens, part in head.walk(x, weight.to(x.dtype), bias, targets, None, None):
            losses[tokens] = part
        ctx.save_for_backward(x, weight, bias, targets)
        ctx.head = head
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets = ctx.saved_tensors
        gradients = _Gradients.zeros(x, weight, bias, ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            for _ in ctx.head.walk(x, weight.to(x.dtype), bias, targets, upstream, gradients):
                pass
        d_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        d_bias = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return gradients.x, d_weight, d_bias, None, None
