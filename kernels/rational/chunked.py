"""The rational activation in plain torch with a hand-written backward, by blocks of rows.

Saved for backward: the inputs; polynomials are evaluated again. The coefficients' gradients are sums over all elements of a
group: each block is reduced on its own in fp32, and only the blocks' sums, a few numbers each, are added up.
On CPU blocks are small enough to stay in the cache, and their temporaries are the same few buffers for every block; on an
accelerator there is one block, which torch reduces as a tree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common.rows import row_blocks

BLOCK_ELEMENTS = 65536  # a thread


def rational_chunked(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """See `kernels.rational.rational`."""
    y: Tensor = _Rational.apply(x, numerator, denominator)
    return y


def _columns(coefficients: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[g, C] -> C tensors [g, 1], ready to meet a block [rows, G, D / G]."""
    return list(coefficients.to(dtype)[..., None].unbind(1))


def _polynomial(h: Tensor, columns: list[Tensor], out: Tensor) -> Tensor:
    """columns[0] + columns[1] h + ..., by Horner's rule, into `out`, which is not h."""
    if not columns:
        return out.zero_()
    if len(columns) == 1:
        return out.copy_(columns[0].expand_as(out))
    torch.mul(h, columns[-1], out=out).add_(columns[-2])
    for column in reversed(columns[:-2]):
        torch.addcmul(column, out, h, out=out)  # one pass, where a product and a sum in place are two
    return out


def _slope(columns: list[Tensor], first: int) -> list[Tensor]:
    """The derivative of columns[0] h^first + columns[1] h^(first + 1) + ..., its constant term first."""
    return [i * column for i, column in enumerate(columns, first)][1 - first :]


def _moments(weight: Tensor, h: Tensor, sums: Tensor) -> None:
    """sums[:, i] += the group's sum of weight * h^i, for every column of sums [G, C]. Consumes weight."""
    for i in range(sums.shape[1]):
        if i:
            weight.mul_(h)
        sums[:, i] += weight.sum((0, 2))


class _Block:
    """The rows of one block as [rows, G, D / G] in the wide dtype, and temporaries of that shape."""

    def __init__(self, rows: Tensor, groups: int, wide: torch.dtype, temporaries: int):
        self.groups, self.same = groups, rows.dtype == wide
        longest = max((block.stop - block.start for block in row_blocks(rows, BLOCK_ELEMENTS)), default=0)
        shape = (temporaries + (not self.same), longest, groups, rows.shape[1] // groups)
        self.buffers = torch.empty(shape, dtype=wide, device=rows.device)

    def of(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(these rows, the temporaries)."""
        *temporaries, last = self.buffers[:, : rows.shape[0]].unbind(0)
        h = self.split(rows)
        return (h, [*temporaries, last]) if self.same else (last.copy_(h), temporaries)

    def split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.groups, -1))


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        above, below = _columns(numerator, wide), _columns(denominator, wide)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ys = y.view(rows.shape)
        of = _Block(rows, max(numerator.shape[0], denominator.shape[0]), wide, temporaries=2)
        for block in row_blocks(rows, BLOCK_ELEMENTS):
            h, (value, divisor) = of.of(rows[block])
            _polynomial(h, below, divisor).mul_(h).abs_().add_(1.0)
            _polynomial(h, above, value)
            if of.same:
                torch.div(value, divisor, out=of.split(ys[block]))
            else:  # dividing into a narrower dtype goes element by element
                of.split(ys[block]).copy_(value.div_(divisor))
        ctx.save_for_backward(x, numerator, denominator)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, numerator, denominator = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        groups = max(numerator.shape[0], denominator.shape[0])
        above, below = _columns(numerator, wide), _columns(denominator, wide)
        above_slope, below_slope = _slope(above, 0), _slope(below, 1)
        negative = [-column for column in below]
        rows, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dxs = dx.view(rows.shape)
        d_above = torch.zeros(groups, len(above), dtype=wide, device=x.device)
        d_below = torch.zeros(groups, len(below), dtype=wide, device=x.device)
        of = _Block(rows, groups, wide, temporaries=5)
        for block in row_blocks(rows, BLOCK_ELEMENTS):
            h, (inner, divisor, to_above, to_below, slope) = of.of(rows[block])
            _polynomial(h, negative, inner).mul_(h)  # minus the polynomial in the denominator
            torch.abs(inner, out=divisor).add_(1.0)
            d = of.split(dys[block])
            torch.div(d if of.same else to_above.copy_(d), divisor, out=to_above)
            # dy / Q, and what one unit more of the denominator's polynomial does: -dy P / Q^2, with the sign of |.|: minus
            # where `inner` is not positive. torch.where took longer than all the rest together.
            _polynomial(h, above, slope).div_(divisor).mul_(to_above)
            torch.ops.aten.leaky_relu_backward.grad_input(slope, inner, -1.0, False, grad_input=to_below)
            _polynomial(h, above_slope, slope).mul_(to_above)
            _polynomial(h, below_slope, inner)
            if of.same:
                torch.addcmul(slope, to_below, inner, out=of.split(dxs[block]))
            else:
                of.split(dxs[block]).copy_(slope.addcmul_(to_below, inner))
            _moments(to_above, h, d_above)
            _moments(to_below.mul_(h), h, d_below)
        return dx, _like(d_above, numerator), _like(d_below, denominator)


def _like(gradient: Tensor, coefficients: Tensor) -> Tensor:
    if coefficients.shape[0] == 1:
        gradient = gradient.sum(0, keepdim=True)
    return gradient.to(coefficients.dtype)
