"""Short causal depthwise convolution, fused with its bias and SiLU: Triton form, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.architecture import architecture
from kernels.packing import check_cu_seqlens, sequence_of_token
from kernels.short_conv.triton_kernels import (
    final_state_kernel,
    forward_kernel,
    initial_state_gradient_kernel,
    input_gradient_kernel,
    weight_gradient_kernel,
)
from kernels.tuning import parameters

DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "short_conv_forward": {"generic": {"BLOCK_T": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 1}},
    "short_conv_weight_gradient": {
        "generic": {"BLOCK_T": 16, "BLOCK_D": 128, "TILES": 8, "num_warps": 4, "num_stages": 1}
    },
    "short_conv_input_gradient": {"generic": {"BLOCK_T": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 1}},
    "short_conv_state": {"generic": {"BLOCK_D": 128, "num_warps": 4, "num_stages": 1}},
}
_TILES = [
    {"BLOCK_T": rows, "BLOCK_D": columns, "num_warps": warps}
    for rows in (8, 16, 32, 64)
    for columns in (64, 128, 256)
    for warps in (2, 4, 8)
    if 256 <= rows * columns // warps <= 1024
]
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "short_conv_forward": _TILES,
    "short_conv_weight_gradient": [
        {**tile, "TILES": tiles}
        for tile in _TILES
        for tiles in (4, 8, 16)
        if tile["BLOCK_T"] * tile["BLOCK_D"] <= 512 * tile["num_warps"]
    ],
    "short_conv_input_gradient": _TILES,
}
WIDEST = 8  # taps


def short_convolution_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y[b, t, d] = act(bias[d] + sum_i weight[d, i] x[b, t - W + 1 + i, d]), and the state after the last token.

    x [B, T, D] (channels contiguous; other strides are free); weight [D, W], W <= 8; bias [D] or None; activation None
    or "silu"; initial_state [N, D, W - 1]: the inputs before the first token; cu_seqlens int32 [N + 1] when B = 1 holds
    N packed sequences: taps never cross a sequence start. Returns y in x's dtype, and the state [N, D, W - 1] or None.
    Raises ValueError for shapes outside of these.
    """
    B, T, D = x.shape
    W = weight.shape[-1]
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, x.device)
    if weight.shape != (D, W) or not 1 <= W <= WIDEST:
        raise ValueError(f"weight must be [D, W] = [{D}, 1 to {WIDEST}], got {tuple(weight.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if initial_state is not None and initial_state.shape != (N, D, W - 1):
        raise ValueError(f"initial_state must be [N, D, W - 1] = {(N, D, W - 1)}, got {tuple(initial_state.shape)}")
    y, final = _ShortConvolution.apply(
        x, weight, bias, initial_state, activation == "silu", output_final_state, cu_seqlens
    )
    return y, final


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        silu: bool,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if x.stride(-1) != 1:
            x = x.contiguous()
        weight = weight.contiguous()
        initial_state = None if initial_state is None else initial_state.contiguous()
        B, T, D = x.shape
        W = weight.shape[1]
        N = B if cu_seqlens is None else cu_seqlens.numel() - 1
        sequence_of = sequence_of_token(cu_seqlens, T)
        packed = cu_seqlens is not None
        arch = architecture(x.device)
        y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
        if y.numel():
            use = parameters("short_conv_forward", arch, defaults=DEFAULTS, D=D, W=W, T=T)
            grid = (B * triton.cdiv(T, use["BLOCK_T"]) * triton.cdiv(D, use["BLOCK_D"]),)
            forward_kernel[grid](
                x, weight, bias, initial_state, y, cu_seqlens, sequence_of, T, x.stride(0), x.stride(1), W, D,
                HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, PACKED=packed, SILU=silu, **use,
            )  # fmt: skip
        final = None
        if output_final_state:
            final = torch.empty(N, D, W - 1, dtype=x.dtype, device=x.device)
            if final.numel():
                use = parameters("short_conv_state", arch, defaults=DEFAULTS, D=D, W=W)
                final_state_kernel[(N * triton.cdiv(D, use["BLOCK_D"]),)](
                    x, initial_state, final, cu_seqlens, T, x.stride(0), x.stride(1), W, D,
                    HAS_INITIAL=initial_state is not None, PACKED=packed, **use,
                )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens, sequence_of)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, cu_seqlens, sequence_of = ctx.saved_tensors
        B, T, D = x.shape
        W = weight.shape[1]
        N = B if cu_seqlens is None else cu_seqlens.numel() - 1
        dy = torch.zeros(B, T, D, dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None or W == 1 else dfinal.contiguous()
        packed = cu_seqlens is not None
        arch = architecture(x.device)
        dz = torch.empty_like(dy) if ctx.silu else dy
        dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
        use = parameters("short_conv_weight_gradient", arch, defaults=DEFAULTS, D=D, W=W, T=T)
        if W > 4:  # the W shifted tiles are alive at once
            use["BLOCK_T"] //= 2
        spans = B * triton.cdiv(T, use["BLOCK_T"] * use["TILES"])
        partials = torch.empty(spans, W + 1, D, dtype=torch.float32, device=x.device)
        if dx.numel():
            weight_gradient_kernel[(spans * triton.cdiv(D, use["BLOCK_D"]),)](
                x, weight, bias, initial_state, dy, dz, partials, cu_seqlens, sequence_of, T, x.stride(0), x.stride(1),
                W, D, HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, PACKED=packed, SILU=ctx.silu,
                **use,
            )  # fmt: skip
            use = parameters("short_conv_input_gradient", arch, defaults=DEFAULTS, D=D, W=W, T=T)
            grid = (B * triton.cdiv(T, use["BLOCK_T"]) * triton.cdiv(D, use["BLOCK_D"]),)
            input_gradient_kernel[grid](
                weight, dz, dfinal, dx, cu_seqlens, sequence_of, T, W, D,
                HAS_DFINAL=dfinal is not None, PACKED=packed, **use,
            )  # fmt: skip
        sums = partials.sum(0)
        dweight = sums[:W].t().to(weight.dtype)
        dbias = None if bias is None else sums[W].to(bias.dtype)
        dinitial = None
        if initial_state is not None and ctx.needs_input_grad[3]:
            dinitial = torch.empty_like(initial_state)
            if dinitial.numel():
                use = parameters("short_conv_state", arch, defaults=DEFAULTS, D=D, W=W)
                initial_state_gradient_kernel[(N * triton.cdiv(D, use["BLOCK_D"]),)](
                    weight, dz, dfinal, dinitial, cu_seqlens, T, W, D, HAS_DFINAL=dfinal is not None, PACKED=packed,
                    **use,
                )  # fmt: skip
        return dx, dweight, dbias, dinitial, None, None, None
