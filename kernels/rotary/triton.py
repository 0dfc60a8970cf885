"""The rotation: Triton form. One kernel turns forward, and backward by the opposite angles; arithmetic in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture
from kernels.tuning import parameters

# ELEMENTS: pairs of channels in a tile.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "rotary": {"generic": {"ELEMENTS": 1024, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "rotary": [{"ELEMENTS": n, "num_warps": w} for n in (512, 1024, 2048) for w in (2, 4, 8)],
}


@triton.jit(do_not_specialize=["R", "T", "period"])
def turn_kernel(
    x, cos, sin, positions, y, R, T, period, sign, stride_b, stride_t, stride_h,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    GATHER: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """y [R, K], a row for each token and head, of x [B, T, H, K]. Grid: row tiles.

    cos, sin [., HALF]: the row of a token is its number modulo `period`, or what `positions` says at that place (GATHER).
    REST: the next power of two of K - 2 HALF, or 0.
    """
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < R
    token = row // H
    at_x = x + token // T * stride_b + token % T * stride_t + row % H * stride_h
    angle = token % period
    if GATHER:
        angle = tl.load(positions + angle, mask=there, other=0)
    d = tl.arange(0, BLOCK)
    mask = there[:, None] & (d < HALF)[None, :]
    c = tl.load(cos + angle[:, None] * HALF + d[None, :], mask=mask, other=0.0)
    s = tl.load(sin + angle[:, None] * HALF + d[None, :], mask=mask, other=0.0) * sign
    if INTERLEAVED:  # a pair is two neighbours: loaded and stored together
        e = tl.arange(0, 2 * BLOCK)
        pairs = there[:, None] & (e < 2 * HALF)[None, :]
        both = tl.load(at_x[:, None] + e[None, :], mask=pairs, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
        out = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * BLOCK))
        tl.store(y + row[:, None] * K + e[None, :], out.to(y.dtype.element_ty), mask=pairs)
    else:
        a = tl.load(at_x[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at_x[:, None] + HALF + d[None, :], mask=mask, other=0.0).to(tl.float32)
        to = y + row[:, None] * K + d[None, :]
        tl.store(to, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
        tl.store(to + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=mask)
    if REST > 0:
        f = 2 * HALF + tl.arange(0, REST)
        others = there[:, None] & (f < K)[None, :]
        kept = tl.load(at_x[:, None] + f[None, :], mask=others, other=0.0)
        tl.store(y + row[:, None] * K + f[None, :], kept, mask=others)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, positions, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        return _turn(dy, cos, sin, positions, ctx.interleaved, -1.0), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, sign: float) -> Tensor:
    B, T, H, K = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(B, T, H, K, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    half = cos.shape[-1]
    use = parameters("rotary", architecture(x.device), defaults=DEFAULTS, K=K, R=2 * half)
    block = triton.next_power_of_2(half)
    rest = triton.next_power_of_2(K - 2 * half) if 2 * half < K else 0
    # What is only copied counts, too, as far as a program's share of it has to fit its registers.
    rows = max(1, use.pop("ELEMENTS") // max(block, rest // 4))
    # Rows of the tables, or of the positions, are shared by the batch where there is one row of them only.
    period = cos.numel() // half if positions is None else positions.numel()
    turn_kernel[(triton.cdiv(B * T * H, rows),)](
        x, cos, sin, positions, y, B * T * H, T, period, sign, x.stride(0), x.stride(1), x.stride(2), H, K, half,
        BLOCK=block, REST=rest, ROWS=rows, GATHER=positions is not None, INTERLEAVED=interleaved, **use,
    )  # fmt: skip
    return y


def rotary_triton(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """See `kernels.rotary.rotary`."""
    cos, sin = cos.to(torch.float32).contiguous(), sin.to(torch.float32).contiguous()
    positions = None if positions is None else positions.contiguous()
    y: Tensor = _Rotary.apply(x, cos, sin, positions, interleaved)
    return y
