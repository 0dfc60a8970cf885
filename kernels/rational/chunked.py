"""The rational activation in plain torch with a hand-written backward, by blocks of rows.

Saved for backward: the inputs; polynomials are evaluated again. The coefficients' gradients are sums over all elements of a
group: each block is reduced on its own in fp32, and only the blocks' sums, a few numbers each, are added up.
On CPU blocks are small enough to stay in the cache; on an accelerator there is one block, which torch reduces as a tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 65536  # a thread


def rational_chunked(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """See `kernels.rational.rational`."""
    return _Rational.apply(x, numerator, denominator)


def _blocks(x: Tensor) -> Iterator[slice]:
    n, D = x.shape
    rows = n if x.device.type != "cpu" else max(1, BLOCK_ELEMENTS * torch.get_num_threads() // D)
    for start in range(0, n, max(rows, 1)):
        yield slice(start, min(start + rows, n))


def _columns(coefficients: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[g, C] -> C tensors [g, 1], ready to meet a block [rows, G, D / G]."""
    return list(coefficients.to(dtype)[..., None].unbind(1))


def _polynomial(h: Tensor, columns: list[Tensor]) -> Tensor:
    """columns[0] + columns[1] h + ..., by Horner's rule, in fresh memory."""
    value = torch.zeros_like(h).add_(columns[-1])
    for column in reversed(columns[:-1]):
        value.mul_(h).add_(column)
    return value


def _slope(h: Tensor, columns: list[Tensor]) -> Tensor:
    """The derivative of `_polynomial` by h."""
    if len(columns) == 1:
        return torch.zeros_like(h)
    return _polynomial(h, [i * column for i, column in enumerate(columns)][1:])


def _moments(weight: Tensor, h: Tensor, sums: Tensor) -> None:
    """sums[:, i] += the group's sum of weight * h^i, for every column of sums [G, C]. Consumes weight."""
    for i in range(sums.shape[1]):
        if i:
            weight.mul_(h)
        sums[:, i] += weight.sum((0, 2))


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = max(numerator.shape[0], denominator.shape[0])
        above, below = _columns(numerator, wide), _columns(denominator, wide)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        for block in _blocks(rows):
            h = rows[block].to(wide).unflatten(-1, (groups, -1))
            divisor = _polynomial(h, below).mul_(h).abs_().add_(1.0)
            y[block] = _polynomial(h, above).div_(divisor).flatten(-2)
        ctx.save_for_backward(x, numerator, denominator)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, numerator, denominator = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = max(numerator.shape[0], denominator.shape[0])
        above, below = _columns(numerator, wide), _columns(denominator, wide)
        from_one = [torch.zeros_like(below[0]), *below]  # b_1 x + ... as a polynomial with constant term 0
        rows, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        d_above = torch.zeros(groups, len(above), dtype=wide, device=x.device)
        d_below = torch.zeros(groups, len(below), dtype=wide, device=x.device)
        for block in _blocks(rows):
            h = rows[block].to(wide).unflatten(-1, (groups, -1))
            inner = _polynomial(h, below).mul_(h)
            divisor = inner.abs().add_(1.0)
            # dy / Q, and what one unit more of the denominator's polynomial does: -dy P / Q^2, with the sign of |.|
            to_above = dys[block].to(wide).unflatten(-1, (groups, -1)) / divisor
            to_below = (_polynomial(h, above) * to_above).div_(divisor)
            to_below = torch.where(inner < 0, to_below, -to_below)
            dx[block] = (to_above * _slope(h, above)).addcmul_(to_below, _slope(h, from_one)).flatten(-2)
            _moments(to_above, h, d_above)
            _moments(to_below.mul_(h), h, d_below)
        return dx.view(x.shape), _like(d_above, numerator), _like(d_below, denominator)


def _like(gradient: Tensor, coefficients: Tensor) -> Tensor:
    if coefficients.shape[0] == 1:
        gradient = gradient.sum(0, keepdim=True)
    return gradient.to(coefficients.dtype)
