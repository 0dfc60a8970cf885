"""The definition of the rational activation."""

from __future__ import annotations

import torch
from torch import Tensor


def rational_reference(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """See `kernels.rational.rational`. Computed in fp32 or wider, then rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = max(numerator.shape[0], denominator.shape[0])
    h = x.to(wide).unflatten(-1, (groups, -1))
    a, b = numerator.to(wide)[..., None], denominator.to(wide)[..., None]
    above, below = torch.zeros_like(h), torch.zeros_like(h)
    for i in range(numerator.shape[1]):
        above = above + a[:, i] * h**i
    for j in range(denominator.shape[1]):
        below = below + b[:, j] * h ** (j + 1)
    # where, not abs: autograd gives abs the derivative 0 at 0.
    return (above / (1.0 + torch.where(below < 0, -below, below))).flatten(-2).to(x.dtype)
