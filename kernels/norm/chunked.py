"""The norms in plain torch with a hand-written backward, by blocks of rows.

Saved for backward: the inputs and one statistic a row; the normalised rows are computed again.
On CPU the rows go through in blocks that stay in the cache: the temporaries of a whole tensor would each be fresh
memory, and mapping those pages costs more than the arithmetic. On an accelerator there is one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common.rows import row_blocks

BLOCK_ELEMENTS = 65536  # a thread; 256 KiB in fp32, so that the four blocks in use fit the L2 cache


def _blocks(rows: Tensor) -> Iterator[slice]:
    return row_blocks(rows, BLOCK_ELEMENTS)


def _statistic(h: Tensor, eps: float, mean: bool) -> Tensor:
    """rsqrt of the mean (or sum) of squares, [rows, 1]."""
    squares = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    if mean:
        squares /= h.shape[-1]
    return squares.add_(eps).rsqrt_()


def _activate(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _activate_backward(gradient: Tensor, gate: Tensor, active: Tensor, silu: bool) -> Tensor:
    if silu:
        return torch.ops.aten.silu_backward(gradient, gate)
    return torch.ops.aten.sigmoid_backward(gradient, active)


class _Norm(torch.autograd.Function):
    """All three norms: weight None for the L2 norm, gate None without a gate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, silu: bool, norm_first: bool
    ) -> Tensor:
        D = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, D)
        gates = None if gate is None else gate.reshape(-1, D)
        w = None if weight is None else weight.to(wide)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y = result.view(-1, D)
        statistic = torch.empty(rows.shape[0], 1, dtype=wide, device=x.device)
        for block in _blocks(rows):
            h = rows[block].to(wide)
            active = None if gates is None else _activate(gates[block].to(wide), silu)
            if active is not None and not norm_first:
                h = h * active
            r = _statistic(h, eps, mean=weight is not None)
            statistic[block] = r
            out = y[block] if y.dtype == wide else None
            normed = torch.mul(h, r) if out is None else torch.mul(h, r, out=out)
            if w is not None:
                normed.mul_(w)
            if active is not None and norm_first:
                normed.mul_(active)
            if out is None:
                y[block] = normed
        ctx.save_for_backward(x, gate, weight, statistic)
        ctx.silu, ctx.norm_first = silu, norm_first
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, statistic = ctx.saved_tensors
        silu, norm_first = ctx.silu, ctx.norm_first
        D = x.shape[-1]
        wide = statistic.dtype
        rows, dys = x.reshape(-1, D), dy.reshape(-1, D)
        gates = None if gate is None else gate.reshape(-1, D)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        dgate = None if gates is None else torch.empty(rows.shape, dtype=gate.dtype, device=x.device)
        # An L2 norm is a weightless norm whose sum of squares is not divided by D.
        divisor = 1 if weight is None else D
        w = torch.ones(D, dtype=wide, device=x.device) if weight is None else weight.to(wide)
        dweight = None if weight is None else torch.zeros_like(w)
        for block in _blocks(rows):
            h, d, r = rows[block].to(wide), dys[block].to(wide), statistic[block]
            source = h
            z = active = None
            if gates is not None:
                z = gates[block].to(wide)
                active = _activate(z, silu)
                if not norm_first:
                    h = h * active
            unit = h * r
            product = d * unit
            if z is not None and active is not None and norm_first and dgate is not None:
                dgate[block] = _activate_backward(product * w, z, active, silu)
                product *= active
                d = d * active
            if dweight is not None:
                dweight += product.sum(0)
            along = torch.mv(product, w).unsqueeze_(1)
            out = dx[block] if dx.dtype == wide and (gates is None or norm_first) else torch.empty_like(unit)
            if weight is None:
                torch.addcmul(d, unit, along, value=-1.0, out=out)
            else:
                torch.mul(d, w, out=out).addcmul_(unit, along, value=-1.0 / divisor)
            out.mul_(r)
            if z is not None and active is not None and not norm_first and dgate is not None:
                dgate[block] = _activate_backward(out * source, z, active, silu)
                out.mul_(active)
            if out.data_ptr() != dx[block].data_ptr():
                dx[block] = out
        return (
            dx.view(x.shape),
            None if dgate is None else dgate.view(gate.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None,
            None,
            None,
        )


def rms_norm_chunked(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.norm.rms_norm`."""
    return _Norm.apply(x, None, weight, eps, True, True)


def l2_norm_chunked(x: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.norm.l2_norm`."""
    return _Norm.apply(x, None, None, eps, True, True)


def gated_rms_norm_chunked(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, activation: str = "silu", norm_first: bool = True
) -> Tensor:
    """See `kernels.norm.gated_rms_norm`."""
    return _Norm.apply(x, gate, weight, eps, activation == "silu", norm_first)
