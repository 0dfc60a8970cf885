"""The definition of the norms."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.norm.rms_norm`."""
    h = _wide(x)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See `kernels.norm.add_rms_norm`."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def l2_norm_reference(x: Tensor, eps: float = 1e-6) -> Tensor:
    """See `kernels.norm.l2_norm`."""
    h = _wide(x)
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, activation: str = "silu", norm_first: bool = True
) -> Tensor:
    """See `kernels.norm.gated_rms_norm`."""
    h, z = _wide(x), _wide(gate)
    a = torch.sigmoid(z) if activation == "sigmoid" else z * torch.sigmoid(z)
    if norm_first:
        return (rms_norm_reference(h, _wide(weight), eps) * a).to(x.dtype)
    return rms_norm_reference(h * a, _wide(weight), eps).to(x.dtype)
