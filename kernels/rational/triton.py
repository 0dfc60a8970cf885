"""The rational activation: Triton form, forward and backward. Arithmetic in fp32.

A program stays within one group, so that the coefficients are the same few numbers for all of its lanes. Their gradients are
summed lane by lane, in registers, over all row tiles of a program, then over its lanes, and stored as one set of partial sums
a program; a second sum over the programs, in a fixed order, ends it. No atomics, and the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.architecture import architecture, facts
from kernels.tuning import parameters

# BYTES: of x in a tile, so that a lane loads as much of every dtype. WAVES: backward programs per CU or SM.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "rational_forward": {"generic": {"BYTES": 4096, "num_warps": 4, "num_stages": 1}},
    "rational_backward": {"generic": {"BYTES": 2048, "WAVES": 4, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "rational_forward": [{"BYTES": n, "num_warps": w} for n in (2048, 4096, 8192) for w in (2, 4, 8)],
    "rational_backward": [
        {"BYTES": n, "WAVES": waves, "num_warps": w}
        for n in (512, 1024, 2048)
        for waves in (2, 4, 8)
        for w in (2, 4, 8)
    ],
}
WIDTHS = (16, 32, 64, 128)  # of tiles; 16 elements of two bytes are one sector of 32 bytes
UNITS_UNKNOWN = 8  # programs per wave where the number of CUs or SMs is not known


@triton.jit
def _load(coefficients, group, FIRST: tl.constexpr, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """COUNT coefficients of a group, as a tuple of fp32 scalars; FIRST more of them count as zero in front."""
    values = ()
    for _ in tl.static_range(FIRST):
        values += (tl.cast(0.0, tl.float32),)
    for i in tl.static_range(COUNT):
        at = i if SHARED else group * COUNT + i
        values += (tl.load(coefficients + at).to(tl.float32),)
    return values


@triton.jit
def _polynomial(h, coefficients, ORDER: tl.constexpr):
    """(value, slope) of coefficients[0] + coefficients[1] h + ... + coefficients[ORDER] h^ORDER, by Horner's rule."""
    value = tl.zeros_like(h) + coefficients[ORDER]
    slope = tl.zeros_like(h)
    for i in tl.static_range(ORDER):
        slope = slope * h + value
        value = value * h + coefficients[ORDER - 1 - i]
    return value, slope


@triton.jit
def _columns(G: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(row tile or share of them, group, columns of x, which of these belong to the group) of this program.

    Programs that are next to each other have the same rows.
    """
    blocks: tl.constexpr = (GROUP + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    place = program % (G * blocks)
    channel = place % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // (G * blocks), place // blocks, place // blocks * GROUP + channel, channel < GROUP


@triton.jit(do_not_specialize=["R"])
def forward_kernel(
    x, numerator, denominator, y, R, stride, G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    NUMERATORS: tl.constexpr, DENOMINATORS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [R, G GROUP] of x. Grid: row tiles times column tiles."""
    tile, group, column, inside = _columns(G, GROUP, BLOCK)
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < R)[:, None] & inside[None, :]
    h = tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    above, _ = _polynomial(h, _load(numerator, group, 0, P + 1, NUMERATORS == 1), P)
    below, _ = _polynomial(h, _load(denominator, group, 1, Q, DENOMINATORS == 1), Q)
    out = above / (1.0 + tl.abs(below))
    tl.store(y + row[:, None] * (G * GROUP) + column[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "tiles"])
def backward_kernel(
    x, numerator, denominator, dy, dx, partials, R, tiles, stride,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    NUMERATORS: tl.constexpr, DENOMINATORS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx [R, G GROUP], and the sums over each program's `tiles` row tiles: partials [P + 1 + Q, programs].

    Grid: shares of the row tiles times column tiles.
    """
    share, group, column, inside = _columns(G, GROUP, BLOCK)
    a = _load(numerator, group, 0, P + 1, NUMERATORS == 1)
    b = _load(denominator, group, 1, Q, DENOMINATORS == 1)
    sums = ()
    for _ in tl.static_range(P + 1 + Q):
        sums += (tl.zeros([ROWS, BLOCK], dtype=tl.float32),)
    for tile in range(tiles):
        row = (tl.cast(share, tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < R)[:, None] & inside[None, :]
        h = tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + row[:, None] * (G * GROUP) + column[None, :], mask=mask, other=0.0).to(tl.float32)
        above, above_slope = _polynomial(h, a, P)
        below, below_slope = _polynomial(h, b, Q)
        inverse = 1.0 / (1.0 + tl.abs(below))
        # dy / Q, and what one unit more of the denominator's polynomial does: -dy P / Q^2 with the sign of |.|
        to_above = d * inverse
        to_below = to_above * (above * inverse)
        to_below = tl.where(below < 0.0, to_below, -to_below)
        out = to_above * above_slope + to_below * below_slope
        tl.store(dx + row[:, None] * (G * GROUP) + column[None, :], out.to(dx.dtype.element_ty), mask=mask)
        # Of the numerator's powers from 0 to P, then of the denominator's from 1 to Q.
        added = ()
        power = tl.zeros_like(h) + 1.0
        for i in tl.static_range(P + 1):
            if i > 0:
                power = power * h
            added += (sums[i] + to_above * power,)
        power = h
        for i in tl.static_range(Q):
            if i > 0:
                power = power * h
            added += (sums[P + 1 + i] + to_below * power,)
        sums = added
    at = partials + tl.program_id(0)
    for i in tl.static_range(P + 1 + Q):
        tl.store(at + i * tl.num_programs(0), tl.sum(sums[i]))


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        numerator, denominator = numerator.contiguous(), denominator.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if y.numel():
            sizes, columns, use = _launch("rational_forward", rows, numerator, denominator)
            forward_kernel[(triton.cdiv(rows.shape[0], sizes["ROWS"]) * columns,)](
                rows, numerator, denominator, y, rows.shape[0], rows.stride(0), **sizes, **use
            )
        ctx.save_for_backward(rows, numerator, denominator)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, numerator, denominator = ctx.saved_tensors
        dx = torch.empty(dy.shape, dtype=rows.dtype, device=rows.device)
        if not dx.numel():
            return dx, torch.zeros_like(numerator), torch.zeros_like(denominator)
        sizes, columns, use = _launch("rational_backward", rows, numerator, denominator)
        G, orders = sizes["G"], (sizes["P"] + 1, sizes["Q"])
        row_tiles = triton.cdiv(rows.shape[0], sizes["ROWS"])
        units = facts(architecture(rows.device)).units or UNITS_UNKNOWN
        tiles = triton.cdiv(row_tiles, min(max(1, units * use.pop("WAVES") // columns), row_tiles))
        shares = triton.cdiv(row_tiles, tiles)
        partials = torch.empty(sum(orders), shares, G, columns // G, dtype=torch.float32, device=rows.device)
        backward_kernel[(shares * columns,)](
            rows,
            numerator,
            denominator,
            dy.contiguous(),
            dx,
            partials,
            rows.shape[0],
            tiles,
            rows.stride(0),
            **sizes,
            **use,
        )
        above, below = partials.sum((1, 3)).split(orders)
        return dx, _like(above, numerator), _like(below, denominator)


def _like(sums: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of coefficients [G or 1, C], of the groups' sums [C, G]."""
    return (sums.sum(1, keepdim=True) if coefficients.shape[0] == 1 else sums).mT.to(coefficients.dtype)


def _launch(
    kernel: str, rows: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[dict[str, int], int, dict[str, int]]:
    """(sizes and tile, column tiles, launch options)."""
    D, G = rows.shape[1], max(numerator.shape[0], denominator.shape[0])
    use = parameters(kernel, architecture(rows.device), defaults=DEFAULTS, D=D, G=G)
    elements, block = use.pop("BYTES") // rows.element_size(), _block(D // G)
    sizes = {"G": G, "GROUP": D // G, "P": numerator.shape[1] - 1, "Q": denominator.shape[1]}
    sizes |= {"NUMERATORS": numerator.shape[0], "DENOMINATORS": denominator.shape[0]}
    sizes |= {"BLOCK": block, "ROWS": max(1, elements // block)}
    return sizes, G * triton.cdiv(D // G, block), use


def _block(group: int) -> int:
    """Columns of a tile: the power of two that leaves the fewest lanes without a channel, and the widest of these."""
    if group < WIDTHS[0]:
        return triton.next_power_of_2(group)
    return min(reversed(WIDTHS), key=lambda width: -(-group // width) * width)


def rational_triton(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """See `kernels.rational.rational`."""
    y: Tensor = _Rational.apply(x, numerator, denominator)
    return y
