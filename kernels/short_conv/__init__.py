"""Short causal depthwise convolution over time, as used in front of linear attention and state-space mixers.

    z[t, d] = bias[d] + sum_i weight[d, i] x[t - W + 1 + i, d]          y = z or silu(z)

Taps never cross the start of a sequence; before it stands `initial_state`, or zeros.
Source: Mamba (arXiv:2312.00752, figure 3) and Gated DeltaNet (arXiv:2412.06464, section 3.4); width 4 in both.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.packing import check_cu_seqlens
from kernels.short_conv.decode import short_convolution_step

__all__ = ["FORMS", "short_convolution", "short_convolution_step"]


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    if objection is not None:
        return objection
    if importlib.util.find_spec("kernels.short_conv.triton") is None:
        return "kernels/short_conv/triton.py does not exist"
    if request.shape["W"] > 8:
        return f"W = {request.shape['W']}: the Triton form unrolls at most 8 taps"
    return None


FORMS = (
    Form("triton", "kernels.short_conv.triton", "short_convolution_triton", _triton_why_not),
    Form("chunked", "kernels.short_conv.chunked", "short_convolution_chunked"),
    Form("reference", "kernels.short_conv.reference", "short_convolution_reference"),
)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution.

    x [B, T, D]; weight [D, W], the last column weighs the current token; bias [D] or None; activation None or "silu".
    initial_state [N, D, W-1]: the W-1 inputs before each sequence, oldest first; N = B, or the packed sequences.
    cu_seqlens int32 [N+1]: packed sequences in one row (B = 1); empty sequences are allowed.

    Returns y [B, T, D] in x's dtype, and the last W-1 inputs of each sequence [N, D, W-1] if output_final_state,
    else None.
    Raises ValueError naming the argument that does not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got {tuple(x.shape)}")
    B, T, D = x.shape
    if weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(f"weight must be [D, W] with D={D}, got {tuple(weight.shape)}")
    W = weight.shape[1]
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be [D] with D={D}, got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, x.device)
    if initial_state is not None and initial_state.shape != (N, D, W - 1):
        raise ValueError(f"initial_state must be [N, D, W-1] = {(N, D, W - 1)}, got {tuple(initial_state.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move it there")
    options = {"activation": activation, "packed": cu_seqlens is not None, "initial_state": initial_state is not None}
    form = choose(
        FORMS, Request("short_convolution", x.device, x.dtype, {"B": B, "T": T, "D": D, "W": W, "N": N}, options)
    )
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
