"""The head's loss in plain torch: a chunk of tokens at a time, its logits turned into their own gradient in place.

With reduction "sum" or "mean" every token's upstream gradient is the same number, so the forward already knows the
gradients up to that factor: it accumulates them while the logits are there, and the backward is a scaling. With "none"
the forward keeps only the log of the partition function, and the backward computes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    z_loss: float
    label_smoothing: float
    mean: bool
    chunk: int


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
    options = _Options(
        ignore_index, z_loss, label_smoothing, reduction == "mean", chunk or default_chunk(weight.shape[0])
    )
    if reduction == "none":
        return _PerToken.apply(x, weight, bias, targets, options)
    return _Reduced.apply(x, weight, bias, targets, options, torch.is_grad_enabled())


def default_chunk(vocabulary: int) -> int:
    """Tokens a chunk: about 4 Mi logits at a time, between 128 and 2048 tokens."""
    return max(128, min(2048, (1 << 22) // vocabulary))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[C, vocabulary] in fp32 or wider; the product itself is in x's dtype."""
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias)


def _losses(logits: Tensor, targets: Tensor, kept: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Each token's loss and its log partition function, both [C]."""
    lse = logits.logsumexp(-1)
    hit = logits.gather(-1, targets[:, None]).squeeze(-1)
    smooth = options.label_smoothing
    aim = hit if smooth == 0.0 else (1 - smooth) * hit + smooth * logits.mean(-1)
    losses = lse - aim + options.z_loss * lse.square()
    return torch.where(kept, losses, 0.0), lse


def _to_gradient(logits: Tensor, lse: Tensor, targets: Tensor, factor: Tensor, options: _Options) -> Tensor:
    """Overwrites logits [C, vocabulary] with factor [C] times the gradient of each token's loss in them."""
    smooth = options.label_smoothing
    grad = logits.sub_(lse[:, None]).exp_()
    if options.z_loss:
        grad.mul_((1 + 2 * options.z_loss * lse)[:, None])
    if smooth:
        grad.sub_(smooth / logits.shape[1])
    grad.scatter_add_(-1, targets[:, None], torch.full_like(lse, smooth - 1)[:, None])
    return grad.mul_(factor[:, None])


@dataclass
class _Gradients:
    """dx in x's dtype; the parameters' gradients summed over chunks in fp32 or wider."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def zeros(cls, x: Tensor, weight: Tensor, bias: Tensor | None) -> _Gradients:
        wide = torch.promote_types(x.dtype, torch.float32)
        return cls(
            torch.zeros_like(x),
            torch.zeros(weight.shape, dtype=wide, device=x.device),
            None if bias is None else torch.zeros(bias.shape, dtype=wide, device=x.device),
        )

    def add(self, a: int, b: int, d_logits: Tensor, x: Tensor, weight: Tensor) -> None:
        d_cast = d_logits.to(x.dtype)
        torch.mm(d_cast, weight, out=self.x[a:b])
        self.weight += d_cast.T @ x
        if self.bias is not None:
            self.bias += d_logits.sum(0)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options, learn: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cast = weight.to(x.dtype)
        kept = targets != options.ignore_index
        safe = torch.where(kept, targets, 0)
        gradients = _Gradients.zeros(x, weight, bias) if learn else None
        total = torch.zeros((), dtype=wide, device=x.device)
        for a in range(0, x.shape[0], options.chunk):
            b = min(a + options.chunk, x.shape[0])
            logits = _logits(x[a:b], cast, bias)
            losses, lse = _losses(logits, safe[a:b], kept[a:b], options)
            total += losses.sum()
            if gradients is not None:
                d_logits = _to_gradient(logits, lse, safe[a:b], kept[a:b].to(wide), options)
                gradients.add(a, b, d_logits, x[a:b], cast)
        share = 1.0 / kept.sum().clamp(min=1).to(wide) if options.mean else torch.ones_like(total)
        if gradients is not None:
            ctx.save_for_backward(gradients.x, gradients.weight, gradients.bias, share)
            ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, share = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        factor = upstream * share
        return (
            (dx * factor).to(dx.dtype),
            (dw * factor).to(weight_dtype),
            None if db is None else (db * factor).to(bias_dtype),
            None,
            None,
            None,
        )


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cast = weight.to(x.dtype)
        kept = targets != options.ignore_index
        safe = torch.where(kept, targets, 0)
        losses = torch.empty(x.shape[0], dtype=wide, device=x.device)
        lse = torch.empty_like(losses)
        for a in range(0, x.shape[0], options.chunk):
            b = min(a + options.chunk, x.shape[0])
            losses[a:b], lse[a:b] = _losses(_logits(x[a:b], cast, bias), safe[a:b], kept[a:b], options)
        ctx.save_for_backward(x, weight, bias, targets, lse)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, lse = ctx.saved_tensors
        options: _Options = ctx.options
        with torch.autocast(x.device.type, enabled=False):
            cast = weight.to(x.dtype)
            kept = targets != options.ignore_index
            safe = torch.where(kept, targets, 0)
            factor = torch.where(kept, upstream, 0.0)
            gradients = _Gradients.zeros(x, weight, bias)
            for a in range(0, x.shape[0], options.chunk):
                b = min(a + options.chunk, x.shape[0])
                logits = _logits(x[a:b], cast, bias)
                d_logits = _to_gradient(logits, lse[a:b], safe[a:b], factor[a:b], options)
                gradients.add(a, b, d_logits, x[a:b], cast)
        db = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        return gradients.x, gradients.weight.to(weight.dtype), db, None, None
