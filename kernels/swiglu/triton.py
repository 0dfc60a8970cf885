"""SwiGLU: Triton form, forward and backward. Arithmetic in fp32; the halves are read where the projection wrote them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture
from kernels.tuning import parameters

# ELEMENTS: of a tile. WIDTH: its columns at most.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "swiglu_forward": {"generic": {"ELEMENTS": 2048, "WIDTH": 1024, "num_warps": 4, "num_stages": 1}},
    "swiglu_backward": {"generic": {"ELEMENTS": 2048, "WIDTH": 1024, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    kernel: [{"ELEMENTS": n, "num_warps": w} for n in (1024, 2048, 4096) for w in (2, 4, 8)] for kernel in DEFAULTS
}


@triton.jit
def _tile(gate_up, R, stride, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's (row [ROWS, 1], h [1, BLOCK], what of both there is, gate, up in fp32) of gate_up [R, 2H]."""
    program = tl.program_id(0)
    columns: tl.constexpr = (H + BLOCK - 1) // BLOCK
    row = (tl.cast(program // columns, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    h = (program % columns * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < R) & (h < H)
    at = gate_up + row * stride + h
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + H, mask=mask, other=0.0).to(tl.float32)
    return row, h, mask, gate, up


@triton.jit(do_not_specialize=["R"])
def forward_kernel(gate_up, y, R, stride, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y [R, H] = silu(gate) * up of gate_up [R, 2H]. Grid: row tiles times column tiles."""
    row, h, mask, gate, up = _tile(gate_up, R, stride, H, BLOCK, ROWS)
    out = gate * tl.sigmoid(gate) * up
    tl.store(y + row * H + h, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def backward_kernel(gate_up, dy, out, R, stride, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out [R, 2H]: the gradient of gate_up, of dy [R, H]."""
    row, h, mask, gate, up = _tile(gate_up, R, stride, H, BLOCK, ROWS)
    d = tl.load(dy + row * H + h, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    to = out + row * (2 * H) + h
    tl.store(to, (d * up * s * (1.0 + gate * (1.0 - s))).to(out.dtype.element_ty), mask=mask)
    tl.store(to + H, (d * gate * s).to(out.dtype.element_ty), mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        R, H = rows.shape[0], rows.shape[1] // 2
        y = torch.empty(*gate_up.shape[:-1], H, dtype=rows.dtype, device=rows.device)
        if y.numel():
            grid, tile, use = _launch("swiglu_forward", rows)
            forward_kernel[grid](rows, y, R, rows.stride(0), H, **tile, **use)
        ctx.save_for_backward(rows)
        ctx.shape = gate_up.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        R, H = rows.shape[0], rows.shape[1] // 2
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        if out.numel():
            grid, tile, use = _launch("swiglu_backward", rows)
            backward_kernel[grid](rows, dy.reshape(R, H).contiguous(), out, R, rows.stride(0), H, **tile, **use)
        return out.view(ctx.shape)


def _launch(kernel: str, rows: Tensor) -> tuple[tuple[int], dict[str, int], dict[str, int]]:
    """(grid, tile, launch options)."""
    R, H = rows.shape[0], rows.shape[1] // 2
    use = parameters(kernel, architecture(rows.device), defaults=DEFAULTS, H=H)
    elements, block = use.pop("ELEMENTS"), min(triton.next_power_of_2(H), use.pop("WIDTH"))
    tile = {"BLOCK": block, "ROWS": max(1, elements // block)}
    return (triton.cdiv(R, tile["ROWS"]) * triton.cdiv(H, block),), tile, use


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """See `kernels.swiglu.swiglu`."""
    y: Tensor = _SwiGLU.apply(gate_up)
    return y
