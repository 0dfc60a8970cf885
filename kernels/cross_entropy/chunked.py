"""The head's loss in plain torch: a chunk of tokens at a time, its logits turned into their own gradient in place.

With reduction "sum" or "mean" every token's upstream gradient is the same number, so the forward already knows the
gradients up to that factor: it accumulates them while the logits are there, and the backward is a scaling. With "none"
the forward keeps only losses, and the backward computes the logits again, each token's upstream gradient folded in.

Two sizes of work: a chunk of tokens makes the matrix products efficient; within it the softmax walks a few rows at a time,
so that its passes in fp32 stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 25  # logits held at a time (64 MiB in bf16) where a chunk of 256 to 1024 tokens allows it
BLOCK_LOGITS = 1 << 18  # logits in fp32 at a time on a CPU: 1 MiB, half of a core's second-level cache


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
) -> Tensor:
    """The loss; see kernels.cross_entropy.linear_cross_entropy."""
    head = _Head(ignore_index, z_loss, label_smoothing, chunk or default_chunk(x.shape[0], weight.shape[0]))
    if reduction == "none":
        return _PerToken.apply(x, weight, bias, targets, head)
    return _Reduced.apply(x, weight, bias, targets, head, reduction == "mean", torch.is_grad_enabled())


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens a chunk: 1024, fewer for vocabularies above 32768 but not below 256; all chunks of nearly one size."""
    most = max(256, min(1024, CHUNK_LOGITS // vocabulary))
    return max(1, math.ceil(tokens / math.ceil(max(tokens, 1) / most)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass
class _Gradients:
    """Of the summed losses: x's in x's dtype, the parameters' summed over chunks in fp32 or wider; None if not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> _Gradients:
        return cls(
            torch.empty_like(x) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=_wide(x), device=x.device) if wanted[1] else None,
            torch.zeros(bias.shape, dtype=_wide(x), device=x.device) if bias is not None and wanted[2] else None,
        )


@dataclass(frozen=True)
class _Head:
    """The loss without its tensors: options and the walk over chunks."""

    ignore_index: int
    z_loss: float
    label_smoothing: float
    chunk: int

    def walk(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: Tensor | None,
        gradients: _Gradients | None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, losses in fp32 or wider) of each chunk; adds factor [N] times a token's gradient to `gradients`.

        weight: already in x's dtype. factor: 1 for every token when None. Ignored tokens have loss 0 and factor 0.
        """
        N, V = x.shape[0], weight.shape[0]
        kept = targets != self.ignore_index
        safe = torch.where(kept, targets, 0)
        factor = kept.to(_wide(x)) if factor is None else torch.where(kept, factor, 0.0)
        # One buffer for all chunks: fresh ones would cost more in page faults than the softmax costs in arithmetic.
        buffer = torch.empty(min(self.chunk, N), V, dtype=x.dtype, device=x.device)
        product = None
        if gradients is not None and gradients.weight is not None:
            product = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        for a in range(0, N, self.chunk):
            b = min(a + self.chunk, N)
            logits = buffer[: b - a]
            torch.mm(x[a:b], weight.T, out=logits)
            losses = self._softmax(logits, bias, safe[a:b], factor[a:b], gradients is not None)
            if gradients is not None:
                if gradients.x is not None:
                    torch.mm(logits, weight, out=gradients.x[a:b])
                if gradients.weight is not None:
                    gradients.weight += torch.mm(logits.T, x[a:b], out=product)
                if gradients.bias is not None:
                    gradients.bias += logits.sum(0, dtype=gradients.bias.dtype)
            yield a, b, torch.where(kept[a:b], losses, 0.0)

    def _softmax(self, logits: Tensor, bias: Tensor | None, targets: Tensor, factor: Tensor, learn: bool) -> Tensor:
        """Losses [C] of logits [C, V]; overwrites the logits, with factor times the gradient in them if `learn`."""
        C, V = logits.shape
        smooth, wide = self.label_smoothing, _wide(logits)
        if bias is not None:
            bias = bias.to(wide)
        at_target = torch.arange(C, device=logits.device) * V + targets
        aim = logits.view(-1)[at_target].to(wide)  # what the loss subtracts from the log partition function
        if bias is not None:
            aim += bias[targets]
        hit = aim.clone()
        lse = torch.empty_like(aim)
        rows = max(1, BLOCK_LOGITS // V) if logits.device.type == "cpu" else C
        block = None if logits.dtype == wide else torch.empty(min(rows, C), V, dtype=wide, device=logits.device)
        for a in range(0, C, rows):
            low = logits[a : a + rows]
            b = a + low.shape[0]
            z = low if block is None else block[: b - a].copy_(low)
            if bias is not None:
                z.add_(bias)
            if smooth:
                aim[a:b].mul_(1 - smooth).add_(z.mean(-1), alpha=smooth)
            top = z.amax(-1, keepdim=True)
            total = z.sub_(top).exp_().sum(-1, keepdim=True)
            lse[a:b] = (top + total.log()).squeeze(-1)
            if learn:
                z.mul_((1 + 2 * self.z_loss * lse[a:b, None]) * factor[a:b, None] / total)
                if smooth:
                    z.sub_(factor[a:b, None] * (smooth / V))
                if block is not None:
                    low.copy_(z)
        if learn:
            # The target's own entry is taken anew in fp32, for p - 1 would cancel after p has been rounded. Each row has
            # one target, so nothing collides.
            own = (hit - lse).exp() * (1 + 2 * self.z_loss * lse) - (1 - smooth + smooth / V)
            logits.view(-1)[at_target] = (own * factor).to(logits.dtype)
        return lse - aim + self.z_loss * lse.square()


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
        total = torch.zeros((), dtype=_wide(x), device=x.device)
        for _, _, losses in head.walk(x, weight.to(x.dtype), bias, targets, None, gradients):
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
        # Not in place: a second backward through a retained graph must find the sums as they were.
        grads = (None if g is None else (g * (upstream * share)).to(dtype) for g, dtype in zip(summed, ctx.dtypes))
        return (*grads, None, None, None, None)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head) -> Tensor:
        losses = torch.empty(x.shape[0], dtype=_wide(x), device=x.device)
        for a, b, part in head.walk(x, weight.to(x.dtype), bias, targets, None, None):
            losses[a:b] = part
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
