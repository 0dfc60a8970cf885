"""RMS norm, also after an addition or with a gate, and L2 norm over the last dim: Triton form. Statistics are fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.architecture import architecture, facts, vendor
from kernels.norm.triton_kernels import backward_kernel, forward_kernel
from kernels.tuning import parameters

# ELEMENTS: size of a tile; a wider row is one tile by itself. WAVES: backward programs per CU or SM.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "norm_forward": {"generic": {"ELEMENTS": 4096, "num_warps": 4, "num_stages": 1}},
    "norm_backward": {"generic": {"ELEMENTS": 4096, "WAVES": 4, "num_warps": 4, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "norm_forward": [{"ELEMENTS": n, "num_warps": w} for n in (1024, 2048, 4096, 8192) for w in (1, 2, 4, 8)],
    "norm_backward": [
        {"ELEMENTS": n, "WAVES": waves, "num_warps": w} for n in (2048, 4096) for waves in (2, 4, 8) for w in (2, 4, 8)
    ],
}
WIDEST = 8192  # elements in a row: a row must fit in the registers of one block
UNITS_UNKNOWN = 8  # programs per wave where the number of CUs or SMs is not known


def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = x (mean x^2 + eps)^(-1/2) weight over the last dim. x [..., D]; weight [D] or None. Returns x's dtype."""
    return _apply(x, None, weight, eps, mean=True, gate_mode=0, silu=False)


def l2_norm_triton(x: Tensor, eps: float) -> Tensor:
    """y = x (sum x^2 + eps)^(-1/2) over the last dim. x [..., D]. Returns x's dtype."""
    return _apply(x, None, None, eps, mean=False, gate_mode=0, silu=False)


def gated_rms_norm_triton(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, *, activation: str = "silu", norm_first: bool = True
) -> Tensor:
    """rms_norm(x) weight act(gate), or rms_norm(x act(gate)) weight where not norm_first.

    x, gate [..., D]; weight [D] or None; activation "silu" or "sigmoid". Returns x's dtype.
    Raises ValueError for another activation or unequal shapes.
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation must be 'silu' or 'sigmoid', got {activation!r}")
    if gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    return _apply(x, gate, weight, eps, mean=True, gate_mode=1 if norm_first else 2, silu=activation == "silu")


def _apply(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, *, mean: bool, gate_mode: int, silu: bool
) -> Tensor:
    D = x.shape[-1]
    if D > WIDEST:
        raise ValueError(f"the fused norms hold a row of at most {WIDEST} elements, got {D}; use the torch form")
    if weight is not None and weight.shape != (D,):
        raise ValueError(f"weight must be [D] = [{D}], got {tuple(weight.shape)}")
    return _Norm.apply(x, gate, weight, eps, mean, gate_mode, silu)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    y, total = _AddNorm.apply(x, residual, weight, eps)
    return y, total


def _rows(x: Tensor) -> Tensor:
    """x as [R, D] with contiguous rows: a view where the strides allow it (slices of a wider projection do)."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        eps: float,
        mean: bool,
        gate_mode: int,
        silu: bool,
    ) -> Tensor:
        shape = x.shape
        x = _rows(x)
        gate = None if gate is None else _rows(gate)
        R, D = x.shape
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        scales = torch.empty(R, dtype=torch.float32, device=x.device)
        flags = {"MEAN": mean, "GATE": gate_mode, "SILU": silu, "HAS_WEIGHT": weight is not None}
        if y.numel():
            use, tile = _tile("norm_forward", x, gate_mode)
            forward_kernel[(triton.cdiv(R, tile["ROWS"]),)](
                x, gate, weight, y, scales, None, None, R, eps, x.stride(0), 0 if gate is None else gate.stride(0), 0, D,
                **tile, **flags, RESIDUAL=False, **use,
            )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, scales)
        ctx.flags, ctx.shape = flags, shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scales = ctx.saved_tensors
        dx, dgate, dweight, _ = _backward(dy, x, gate, weight, scales, ctx.flags)
        return dx.view(ctx.shape), None if dgate is None else dgate.view(ctx.shape), dweight, None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        shape, dtype = x.shape, torch.promote_types(x.dtype, residual.dtype)
        ctx.dtypes, ctx.shape = (x.dtype, residual.dtype), shape
        x, residual = _rows(x), _rows(residual)
        R, D = x.shape
        y, total = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
        scales = torch.empty(R, dtype=torch.float32, device=x.device)
        flags = {"MEAN": True, "GATE": 0, "SILU": False, "HAS_WEIGHT": True}
        if y.numel():
            use, tile = _tile("norm_forward", x, 0)
            forward_kernel[(triton.cdiv(R, tile["ROWS"]),)](
                x, None, weight, y, scales, residual, total, R, eps, x.stride(0), 0, residual.stride(0), D,
                **tile, **flags, RESIDUAL=True, **use,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, scales)
        ctx.flags = flags
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        if dy is None:
            dx, d_residual = (None if d_total is None else d_total.to(dtype) for dtype in ctx.dtypes)
            return dx, d_residual, None, None
        low = next((dtype for dtype in ctx.dtypes if dtype != total.dtype), None)
        rows = total.view(-1, total.shape[-1])
        wide, _, dweight, lower = _backward(dy, rows, None, weight, scales, ctx.flags, d_total, low)
        dx, d_residual = (
            (wide if dtype == wide.dtype or lower is None else lower).view(ctx.shape) for dtype in ctx.dtypes
        )
        return dx, d_residual, dweight, None


def _backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scales: Tensor,
    flags: dict[str, Any],
    d_total: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx [R, D], dgate, dweight, dx in the dtype `low`) of rows x [R, D]; d_total is added to dx."""
    R, D = x.shape
    dy = dy.reshape(R, D).contiguous()
    d_total = None if d_total is None else d_total.reshape(R, D).contiguous()
    dx = torch.empty(R, D, dtype=x.dtype, device=x.device)
    d_low = None if low is None else torch.empty(R, D, dtype=low, device=x.device)
    dgate = None if gate is None else torch.empty(R, D, dtype=gate.dtype, device=gate.device)
    dweight = None if weight is None else torch.zeros_like(weight)
    if dx.numel():
        use, tile = _tile("norm_backward", x, flags["GATE"])
        units = facts(architecture(x.device)).units or UNITS_UNKNOWN
        row_tiles = triton.cdiv(R, tile["ROWS"])
        tiles = triton.cdiv(row_tiles, min(units * use.pop("WAVES"), row_tiles))
        programs = triton.cdiv(row_tiles, tiles)
        partials = None if weight is None else torch.empty(programs, D, dtype=torch.float32, device=x.device)
        backward_kernel[(programs,)](
            x, gate, weight, dy, scales, dx, dgate, partials, d_total, d_low, R, tiles, x.stride(0),
            0 if gate is None else gate.stride(0), D, **tile, **flags, RESIDUAL=d_total is not None,
            BOTH=d_low is not None, **use,
        )  # fmt: skip
        if partials is not None and weight is not None:
            dweight = partials.sum(0).to(weight.dtype)
    return dx, dgate, dweight, d_low


def _tile(kernel: str, x: Tensor, gate_mode: int) -> tuple[dict[str, int], dict[str, int]]:
    """(launch options, tile shape). More warps where one row alone exceeds the tile."""
    D = x.shape[1]
    arch = architecture(x.device)
    use = parameters(kernel, arch, defaults=DEFAULTS, D=D, gate=gate_mode)
    elements = use.pop("ELEMENTS")
    if gate_mode and kernel == "norm_backward":  # twice the operands of the plain norm
        elements //= 2
    block_d = triton.next_power_of_2(D)
    if block_d > elements:
        widest = 16 if vendor(arch) == "nvidia" else 8
        use["num_warps"] = min(widest, max(use["num_warps"], use["num_warps"] * block_d // elements))
    return use, {"BLOCK_D": block_d, "ROWS": max(1, elements // block_d)}
