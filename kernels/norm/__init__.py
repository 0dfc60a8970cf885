"""RMS norm, also after an addition or with a gate, and L2 norm, over the last dim. Statistics in fp32 at least.

Sources: RMSNorm, arXiv:1910.07467, equation 4; the gates of Gated DeltaNet (arXiv:2412.06464, figure 1: norm first)
and of Mamba-2 (arXiv:2405.21060, section 7.1: gate first).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, eager_objection, triton_objection

__all__ = [
    "ADD_RMS_NORM_FORMS",
    "GATED_RMS_NORM_FORMS",
    "L2_NORM_FORMS",
    "RMS_NORM_FORMS",
    "add_rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "rms_norm",
]


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    if objection is not None:
        return objection
    if importlib.util.find_spec("kernels.norm.triton") is None:
        return "kernels/norm/triton.py does not exist"
    if request.shape["D"] > 8192:
        return f"D = {request.shape['D']}: the Triton form holds a row of at most 8192 elements"
    return None


def _forms(function: str, chunked: str = "kernels.norm.chunked") -> tuple[Form, ...]:
    return (
        Form("triton", "kernels.norm.triton", f"{function}_triton", _triton_why_not),
        Form("chunked", chunked, f"{function}_chunked", eager_objection),
        Form("reference", "kernels.norm.reference", f"{function}_reference"),
    )


RMS_NORM_FORMS = _forms("rms_norm")
L2_NORM_FORMS = _forms("l2_norm")
GATED_RMS_NORM_FORMS = _forms("gated_rms_norm")
ADD_RMS_NORM_FORMS = _forms("add_rms_norm", "kernels.norm.residual")
FORMS = RMS_NORM_FORMS


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(mean(x²) + eps) * weight over the last dim.

    x [..., D]; weight [D]. Returns x's shape and dtype. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, eps)
    form = choose(RMS_NORM_FORMS, _request("rms_norm", x))
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(total) * weight, total) with total = x + residual: a residual connection and the norm that follows it.

    x, residual [..., D], not necessarily of one dtype; weight [D]. Both results have the wider of the two dtypes. Only total is
    kept for the backward, where the gradients of both results are added on the way.
    Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, eps)
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(
            f"residual must be floating point {tuple(x.shape)} as x, got {residual.dtype} {tuple(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, x is on {x.device}: move it there")
    D, dtype = x.shape[-1], torch.promote_types(x.dtype, residual.dtype)
    form = choose(ADD_RMS_NORM_FORMS, Request("add_rms_norm", x.device, dtype, {"rows": x.numel() // D, "D": D}))
    with torch.autocast(x.device.type, enabled=False):
        normed, total = form.load()(x, residual, weight, eps)
        return normed, total


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(sum(x²) + eps) over the last dim: unit vectors, and a zero vector stays zero with a finite gradient.

    x [..., D]. Returns x's shape and dtype. Raises ValueError naming the argument that does not fit.
    """
    _check(x, None, eps)
    form = choose(L2_NORM_FORMS, _request("l2_norm", x))
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(x, eps)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
    norm_first: bool = True,
) -> Tensor:
    """RMS norm with an output gate, a = silu or sigmoid.

    norm_first: rms_norm(x) * weight * a(gate)          (Gated DeltaNet; KDA with "sigmoid")
    otherwise:  rms_norm(x * a(gate)) * weight          (Mamba-2)
    x, gate [..., D]; weight [D]. Returns x's shape and dtype. Raises ValueError naming the argument that does not fit.
    """
    _check(x, weight, eps)
    if gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device}, x is on {x.device}: move it there")
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f'activation must be "silu" or "sigmoid", got {activation!r}')
    request = _request("gated_rms_norm", x, activation=activation, norm_first=norm_first)
    form = choose(GATED_RMS_NORM_FORMS, request)
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(x, gate, weight, eps, activation=activation, norm_first=norm_first)


def _request(op: str, x: Tensor, **options: object) -> Request:
    D = x.shape[-1]
    return Request(op, x.device, x.dtype, {"rows": x.numel() // max(D, 1), "D": D}, options)


def _check(x: Tensor, weight: Tensor | None, eps: float) -> None:
    if x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., D] with D >= 1, got {x.dtype} {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [D] with D={x.shape[-1]}, got {tuple(weight.shape)}")
    if weight is not None and weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x is on {x.device}: move it there")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
