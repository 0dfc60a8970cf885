"""An addition and the RMS norm of its result in plain torch, by blocks of rows, with a hand-written backward.

The block is normalised while the sum is still in the cache, and the backward adds the sum's own gradient to the norm's where
that is computed: autograd would pass over the residual stream once more for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.norm.chunked import _blocks, _statistic


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        D, dtype = x.shape[-1], torch.promote_types(x.dtype, residual.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        left, right = x.reshape(-1, D), residual.reshape(-1, D)
        results = [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2)]
        y, total = (result.view(-1, D) for result in results)
        statistic = torch.empty(left.shape[0], 1, dtype=wide, device=x.device)
        w = weight.to(wide)
        for block in _blocks(total):
            h = torch.add(left[block], right[block], out=total[block]).to(wide)
            statistic[block] = r = _statistic(h, eps, mean=True)
            if dtype == wide:
                torch.mul(h, r, out=y[block]).mul_(w)
            else:
                y[block] = h.mul_(r).mul_(w)  # h is a copy here
        ctx.save_for_backward(results[1], weight, statistic)
        ctx.dtypes = (x.dtype, residual.dtype)
        ctx.set_materialize_grads(False)
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, statistic = ctx.saved_tensors
        d_weight = None
        gradient = d_total
        if dy is not None:
            gradient, d_weight = _backward(dy, d_total, total, weight, statistic)
        dx, d_residual = (None if gradient is None else gradient.to(dtype) for dtype in ctx.dtypes)
        return dx, d_residual, d_weight, None


def _backward(
    dy: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, statistic: Tensor
) -> tuple[Tensor, Tensor]:
    D, wide = total.shape[-1], statistic.dtype
    rows, dys = total.reshape(-1, D), dy.reshape(-1, D)
    others = None if d_total is None else d_total.reshape(-1, D)
    out = torch.empty(rows.shape, dtype=total.dtype, device=total.device)
    w = weight.to(wide)
    d_weight = torch.zeros_like(w)
    for block in _blocks(rows):
        d, r = dys[block].to(wide), statistic[block]
        unit = rows[block].to(wide) * r
        product = d * unit
        d_weight += product.sum(0)
        along = torch.mv(product, w).unsqueeze_(1)
        into = out[block] if out.dtype == wide else product
        torch.mul(d, w, out=into).addcmul_(unit, along, value=-1.0 / D).mul_(r)
        if others is not None:
            into.add_(others[block])
        if into is product:
            out[block] = product
    return out.view(total.shape), d_weight.to(weight.dtype)


def add_rms_norm_chunked(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    y, total = _AddNorm.apply(x, residual, weight, eps)
    return y, total
