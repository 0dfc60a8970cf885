"""The rotation in plain torch, written straight into its result; its backward is the rotation by the opposite angles.

Autograd would keep both factors of four products; here nothing of x is kept. On a CPU tokens go through in blocks, whose
temporaries stay in the cache. Interleaved pairs are complex numbers, and the rotation is one complex product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common.rows import row_blocks

BLOCK_ELEMENTS = 1 << 16  # of x, a thread: in bf16 the block is there twice more in fp32


def rotary_chunked(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """See `kernels.rotary.rotary`."""
    if positions is not None:
        cos, sin = cos[positions][:, :, None], sin[positions][:, :, None]
    wide = torch.promote_types(x.dtype, torch.float32)
    # One row for each token: [B * T, 1, R / 2].
    cos, sin = (t.to(wide).expand(*x.shape[:2], 1, -1).flatten(0, 1) for t in (cos, sin))
    y: Tensor = _Rotary.apply(x, cos, sin, interleaved)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, ctx.interleaved, -1.0), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    """x [B, T, H, K] turned by sign times the angles, [B * T, 1, R / 2]."""
    rows, half = x.flatten(0, 1), cos.shape[-1]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = result.flatten(0, 1)
    for block in row_blocks(out, BLOCK_ELEMENTS):
        r, o, c, s = rows[block], out[block], cos[block], sin[block]
        if interleaved:
            _turn_interleaved(r[..., : 2 * half], o[..., : 2 * half], c, s, sign)
        else:
            _turn_halves(r[..., : 2 * half], o[..., : 2 * half], c, s, sign)
        if 2 * half < x.shape[-1]:
            o[..., 2 * half :] = r[..., 2 * half :]
    return result


def _turn_halves(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    half = cos.shape[-1]
    wide = x.to(cos.dtype)
    into = out if out.dtype == cos.dtype else torch.empty_like(wide)
    a, b = wide[..., :half], wide[..., half:]
    torch.mul(a, cos, out=into[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=into[..., half:]).addcmul_(a, sin, value=sign)
    if into is not out:
        out.copy_(into)


def _turn_interleaved(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    # A complex view wants even strides, which slices need not have.
    wide = x.to(cos.dtype).contiguous()
    turn = torch.complex(cos, sin if sign > 0 else -sin)
    product = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn
    out.copy_(torch.view_as_real(product).flatten(-2))
