"""The routed feed-forward in Triton: no padding, no permuted copies of tokens or gradients.

Forward: sort the choices (triton_sort), up with the activation and the combine weight in its epilogue, down with a store that
scatters, sum over each token's choices (not for one choice: its rows already are y). The weight multiplies the hidden
activation, so that the experts' outputs need not be kept (SonicMoE, 2512.14080). Kept for the backward: x and the
projections of gate and up.

Matrices that are kept in another dtype than x are cast once in each direction: inside the products every tile of rows would
read the wider one again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.architecture import architecture, dot_precision
from kernels.common.tiles import dies
from kernels.experts import triton_sort
from kernels.experts.triton_gradients import hidden_gradient_kernel, weight_gradient_kernel
from kernels.experts.triton_products import combine_kernel, out_kernel, up_kernel
from kernels.experts.triton_sort import Sorted
from kernels.tuning import Use, parameters

# TILE: rows of a tile, the same for all products of sorted rows. BLOCK_N: columns; of the gate and as many of up where there
# is one. GROUP: tiles of rows that read the same columns at about the same time.
_PRODUCT = {"BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "experts_tile": {"generic": {"TILE": 64}},
    "experts_up": {"generic": _PRODUCT},
    "experts_out": {"generic": _PRODUCT},
    "experts_hidden_gradient": {"generic": {**_PRODUCT, "num_warps": 8}},
    "experts_weight_gradient": {"generic": {"BLOCK_M": 64, **_PRODUCT}},
    "experts_combine": {"generic": {"ELEMENTS": 2048, "WIDTH": 1024, "num_warps": 4, "num_stages": 1}},
    **triton_sort.DEFAULTS,
}
_PRODUCTS: list[dict[str, int]] = [
    {"BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
    for n in (64, 128)
    for k in (32, 64)
    for w in (4, 8)
    for s in (2, 3, 4)
]
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "experts_tile": [{"TILE": n} for n in (64, 128)],
    "experts_up": _PRODUCTS,
    "experts_out": _PRODUCTS,
    "experts_hidden_gradient": _PRODUCTS,
    "experts_weight_gradient": [{"BLOCK_M": m, **use} for m in (64, 128) for use in _PRODUCTS],
    "experts_combine": [{"ELEMENTS": n, "num_warps": w} for n in (1024, 2048, 4096) for w in (2, 4, 8)],
    **triton_sort.CANDIDATES,
}
LEAST_TILE = 16  # rows: the smallest that matrix units take


class _Launch:
    """What all kernels of one call have in common."""

    def __init__(self, x: Tensor, down: Tensor, choices: int, activation: str, gated: bool):
        self.E, self.F, self.D = down.shape
        self.arch, self.bytes, self.choices = architecture(x.device), x.element_size(), choices
        self.activation = {"ACTIVATION": activation, "GATED": gated}
        self.aligned = int(self.D % 128 == 0 and self.F % 128 == 0)  # whole tiles of columns
        self.precision = {"PRECISION": dot_precision(self.arch, "state"), "DIES": dies(x.device)}

    def use(self, kernel: str, **keys: int) -> Use:
        return parameters(kernel, self.arch, defaults=DEFAULTS, bytes=self.bytes, aligned=self.aligned, **keys)

    def sort(self, indices: Tensor) -> Sorted:
        """Tiles as tall as the experts' shares are on average, so that few rows of them lie idle."""
        share = triton.next_power_of_2(triton.cdiv(indices.numel(), self.E))
        return triton_sort.sort(indices, self.E, max(LEAST_TILE, min(self.use("experts_tile")["TILE"], share)))

    def tiled(self, kernel: str, where: Sorted, columns: int) -> tuple[tuple[int], dict[str, Any]]:
        """(grid, constants and options) of a product of sorted rows."""
        use = self.use(kernel, TILE=where.tile)
        grid = (where.tiles * triton.cdiv(columns, use["BLOCK_N"]),)
        return grid, {"E": self.E, "BINS": where.bins, "TILE": where.tile, **self.precision, **use}

    def out(self, source: Tensor, weight: Tensor, strides: tuple[int, int, int], where: Sorted) -> Tensor:
        """source [P, K], rows sorted, times weight[expert] [K, D] of `strides`, summed over choices: [N, D]."""
        P, K = source.shape
        rows = source.new_empty(P, self.D)
        grid, use = self.tiled("experts_out", where, self.D)
        out_kernel[grid](source, weight, where.order, where.table, rows, K, self.D, *strides, **use)
        if self.choices == 1:
            return rows
        N = P // self.choices
        y = source.new_empty(N, self.D)
        use = self.use("experts_combine")
        elements, block = use.pop("ELEMENTS"), min(triton.next_power_of_2(self.D), use.pop("WIDTH"))
        height = max(1, elements // block)
        grid = (triton.cdiv(N, height) * triton.cdiv(self.D, block),)
        combine_kernel[grid](rows, y, N, self.D, self.choices, ROWS=height, BLOCK=block, **use)
        return y

    def weight_gradient(
        self, left: Tensor, right: Tensor, gathered: tuple[bool, bool], where: Sorted, like: Tensor
    ) -> Tensor:
        """Each expert's left^T right over its rows, in like's shape and dtype. gathered: whose rows are tokens."""
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        _, M, N = like.shape
        use = self.use("experts_weight_gradient")
        grid = (self.E * triton.cdiv(M, use["BLOCK_M"]) * triton.cdiv(N, use["BLOCK_N"]),)
        choices = [self.choices if tokens else 0 for tokens in gathered]
        weight_gradient_kernel[grid](
            left,
            right,
            where.order,
            where.table,
            out,
            M,
            N,
            *choices,
            E=self.E,
            BINS=where.bins,
            **self.precision,
            **use,
        )
        return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, activation: str, keep: bool
    ) -> Tensor:
        _, F, D = down.shape
        width = gate_up.shape[2]
        P = indices.numel()
        ctx.shapes = (gate_up.shape, gate_up.dtype, down.dtype)
        if P == 0:
            ctx.save_for_backward(x, gate_up, down, scores)
            return torch.zeros_like(x)
        launch = _Launch(x, down, indices.shape[1], activation, width != F)
        x, scores = x.contiguous(), scores.contiguous()
        where = launch.sort(indices.contiguous())
        hidden = x.new_empty(P, width) if keep else x
        acted = x.new_empty(P, F)
        grid, use = launch.tiled("experts_up", where, F)
        up_kernel[grid](
            x, _cast(gate_up, x), scores, where.order, where.table, hidden, acted, D, F, launch.choices,
            KEEP=keep, **launch.activation, **use,
        )  # fmt: skip
        y = launch.out(acted, _cast(down, x), (F * D, D, 1), where)
        ctx.launch, ctx.where = launch, where
        ctx.save_for_backward(x, gate_up, down, scores, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if len(ctx.saved_tensors) == 4:  # no tokens
            zeros = [torch.zeros_like(t) if w else None for t, w in zip(ctx.saved_tensors, (*wanted[:3], wanted[4]))]
            return zeros[0], zeros[1], zeros[2], None, zeros[3], None, None
        x, gate_up, down, scores, hidden = ctx.saved_tensors
        launch, where = ctx.launch, ctx.where
        _, F, D = down.shape
        P, width = hidden.shape
        dy = dy.contiguous()
        grid, use = launch.tiled("experts_hidden_gradient", where, F)
        d_hidden, acted = torch.empty_like(hidden), x.new_empty(P, F)
        d_scores = torch.empty(triton.cdiv(F, use["BLOCK_N"]), P, dtype=torch.float32, device=x.device)
        hidden_gradient_kernel[grid](
            dy, _cast(down, x), scores, hidden, where.order, where.table, d_hidden, acted, d_scores, P,
            D, F, launch.choices, **launch.activation, **use,
        )  # fmt: skip
        d_down = launch.weight_gradient(acted, dy, (False, True), where, down) if wanted[2] else None
        del acted
        d_gate_up = launch.weight_gradient(x, d_hidden, (True, False), where, gate_up) if wanted[1] else None
        dx = launch.out(d_hidden, _cast(gate_up, x), (D * width, 1, width), where) if wanted[0] else None
        d_weights = d_scores.sum(0).view_as(scores).to(scores.dtype) if wanted[4] else None
        return dx, d_gate_up, d_down, None, d_weights, None, None


def _cast(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).contiguous()


def experts_triton(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, *, activation: str
) -> Tensor:
    """See `kernels.experts.experts`."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, scores))
    y: Tensor = _Experts.apply(x, gate_up, down, indices, scores, activation, keep)
    return y
