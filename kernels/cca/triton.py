"""CCA's queries and keys: Triton form, forward and backward. Products in z's dtype, sums, means and norms in fp32.

Kept for the backward: the inputs. One gradient of z's size makes a trip through memory, that of what is normalised: the gradient
of z needs it of later tokens and of the group's other heads, those of the taps need it of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.architecture import architecture, dot_precision, facts
from kernels.cca.taps import combined, separated
from kernels.cca.triton_kernels import (
    forward_kernel,
    input_gradient_kernel,
    norm_gradient_kernel,
    tap_gradient_kernel,
)
from kernels.packing import sequence_of_token
from kernels.tuning import parameters

# ELEMENTS: of a tile of one head. ROWS: of a tap in one product, in bytes. WAVES: programs a CU or SM.
_TILE = {"ELEMENTS": 8192, "ROWS": 128, "num_warps": 8, "num_stages": 2}
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "cca_forward": {"generic": _TILE},
    "cca_norm_gradient": {"generic": _TILE},
    "cca_input_gradient": {"generic": _TILE},
    "cca_tap_gradient": {"generic": {**_TILE, "WAVES": 4}},
}
_TILES: list[dict[str, int]] = [
    {"ELEMENTS": elements, "ROWS": rows, "num_warps": warps, "num_stages": stages}
    for elements, warps in ((4096, 4), (8192, 4), (8192, 8), (16384, 8))
    for rows in (64, 128)
    for stages in (2, 3)
]
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "cca_forward": _TILES,
    "cca_norm_gradient": _TILES,
    "cca_input_gradient": _TILES,
    "cca_tap_gradient": [{**tile, "WAVES": waves} for tile in _TILES for waves in (2, 4, 8)],
}
TALLEST = 128  # tokens of a tile
UNITS_UNKNOWN = 8  # where the number of CUs or SMs is not known


def _launch(kernel: str, z: Tensor, d: int) -> tuple[dict[str, int], dict[str, int]]:
    """(tile, launch options)."""
    use = parameters(kernel, architecture(z.device), defaults=DEFAULTS, D=d, bytes=z.element_size())
    if kernel == "cca_tap_gradient" and z.element_size() == 4:  # its sums over tokens are in three passes of tf32
        use["ELEMENTS"] //= 2
    wide = max(16, triton.next_power_of_2(d))
    rows = min(wide, max(16, use.pop("ROWS") // z.element_size()))
    tall = min(TALLEST, max(16, use.pop("ELEMENTS") // wide))
    return {"BLOCK_T": tall, "BLOCK_D": wide, "BLOCK_K": rows}, use


class _CCA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        grouped: Tensor,
        grouped_bias: Tensor,
        factor: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        z = z if z.stride(-1) == 1 else z.contiguous()
        state = None if state is None else state.contiguous()
        B, T, _ = z.shape
        J, _, d = grouped.shape
        HKV = factor.numel()
        q = torch.empty(B, T, J - HKV, d, dtype=z.dtype, device=z.device)
        k = torch.empty(B, T, HKV, d, dtype=z.dtype, device=z.device)
        ctx.save_for_backward(z, depthwise, depthwise_bias, grouped, grouped_bias, factor, state, cu_seqlens)
        ctx.eps = eps
        if z.numel():
            taps, offset = combined(depthwise, depthwise_bias, grouped, grouped_bias)
            sizes, flags = _call(z, factor, taps, state, cu_seqlens)
            tile, use = _launch("cca_forward", z, d)
            forward_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]) * J,)](
                z, state, taps.to(z.dtype), offset, factor.float(), q, k, cu_seqlens, sequence_of_token(cu_seqlens, T),
                T, z.stride(0), z.stride(1), eps, **sizes, **flags, **tile, **use,
            )  # fmt: skip
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        z, depthwise, depthwise_bias, grouped, grouped_bias, factor, state, cu_seqlens = ctx.saved_tensors
        B, T, C = z.shape
        J, _, d = grouped.shape
        dz = torch.empty(B, T, C, dtype=z.dtype, device=z.device)
        if not z.numel():
            gradients = (depthwise, depthwise_bias, grouped, grouped_bias, factor, state)
            return dz, *(None if x is None else torch.zeros_like(x) for x in gradients), None, None
        wide_taps, offset = combined(depthwise, depthwise_bias, grouped, grouped_bias)
        taps = wide_taps.to(z.dtype)
        sizes, flags = _call(z, factor, taps, state, cu_seqlens)
        sequence_of = sequence_of_token(cu_seqlens, T)
        ds = torch.empty_like(dz)
        tile, use = _launch("cca_norm_gradient", z, d)
        tiles = B * triton.cdiv(T, tile["BLOCK_T"])
        dfactor = torch.empty(tiles, sizes["HKV"], dtype=torch.float32, device=z.device)
        norm_gradient_kernel[(tiles * J,)](
            z, state, taps, offset, factor.float(), dq.contiguous(), dk.contiguous(), ds, dfactor, cu_seqlens, sequence_of,
            T, z.stride(0), z.stride(1), ctx.eps, **sizes, **flags, **tile, **use,
        )  # fmt: skip
        tile, use = _launch("cca_input_gradient", z, d)
        input_gradient_kernel[(B * triton.cdiv(T, tile["BLOCK_T"]) * J,)](
            taps, ds, dz, cu_seqlens, sequence_of, T, **sizes, PACKED=flags["PACKED"], PRECISION=flags["PRECISION"],
            **tile, **use,
        )  # fmt: skip
        dtaps, doffset = _tap_gradients(z, state, ds, J, sizes["R"], cu_seqlens, sequence_of, flags)
        dparameters = separated(dtaps, doffset, depthwise, depthwise_bias, grouped)
        given = (depthwise, depthwise_bias, grouped, grouped_bias)
        dstate = _state_gradient(ds, wide_taps, state, cu_seqlens) if ctx.needs_input_grad[6] else None
        return (
            dz,
            *(gradient.to(parameter.dtype) for gradient, parameter in zip(dparameters, given)),
            dfactor.sum(0).to(factor.dtype),
            dstate,
            None,
            None,
        )


def _call(
    z: Tensor, factor: Tensor, taps: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[dict[str, int], dict[str, Any]]:
    """(sizes, flags) that all kernels take."""
    J, shifts, d, _ = taps.shape
    sizes = {"H": J - factor.numel(), "HKV": factor.numel(), "D": d, "R": shifts - 1}
    precision = dot_precision(architecture(z.device), "state")
    has_state = state is not None and state.numel() > 0
    return sizes, {"HAS_STATE": has_state, "PACKED": cu_seqlens is not None, "PRECISION": precision}


def _tap_gradients(
    z: Tensor,
    state: Tensor | None,
    ds: Tensor,
    J: int,
    R: int,
    cu_seqlens: Tensor | None,
    sequence_of: Tensor | None,
    flags: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(dtaps [J, R + 1, d, d], doffset [C]), fp32. As many spans of tokens as fill the device, added up at the end."""
    B, T, C = z.shape
    d = C // J
    tile, use = _launch("cca_tap_gradient", z, d)
    units = facts(architecture(z.device)).units or UNITS_UNKNOWN
    each = J * (R + 1) * triton.cdiv(d, tile["BLOCK_K"])  # programs a span
    tiles = triton.cdiv(T, tile["BLOCK_T"])
    wanted = triton.cdiv(units * use.pop("WAVES"), each * B)  # spans of a row
    together = triton.cdiv(tiles, min(wanted, tiles))
    spans = B * triton.cdiv(tiles, together)
    dtaps = torch.empty(spans, J, R + 1, d, d, dtype=torch.float32, device=z.device)
    doffset = torch.empty(spans, C, dtype=torch.float32, device=z.device)
    tap_gradient_kernel[(spans * each,)](
        z, state, ds, dtaps, doffset, cu_seqlens, sequence_of, T, together, z.stride(0), z.stride(1), J, d, R,
        **flags, **tile, **use,
    )  # fmt: skip
    return dtaps.sum(0), doffset.sum(0)


def _state_gradient(ds: Tensor, taps: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[N, R, C]: the first R tokens of each sequence see the columns before it."""
    (B, T, _), (J, _, d, _), R = ds.shape, taps.shape, state.shape[1]
    if cu_seqlens is None:
        starts, ends = torch.arange(B, device=ds.device) * T, torch.arange(1, B + 1, device=ds.device) * T
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    where = starts[:, None] + torch.arange(R, device=ds.device)
    there = where < ends[:, None]
    first = ds.view(B * T, J, d)[torch.where(there, where, 0)] * there[..., None, None]
    dstate = torch.zeros(*state.shape[:2], J, d, dtype=torch.float32, device=ds.device)
    for ago in range(1, R + 1):  # token r sees slot R - ago + r
        dstate[:, R - ago :] += torch.einsum("nrjo,jco->nrjc", first[:, :ago].float(), taps[:, ago])
    return dstate.flatten(2).to(state.dtype)


def cca_triton(
    z: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    factor: Tensor,
    *,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.cca.cca`."""
    q, k = _CCA.apply(z, depthwise, depthwise_bias, grouped, grouped_bias, factor, initial_state, cu_seqlens, eps)
    return q, k
