"""Newton-Schulz by definition: the polynomials act on the singular values, found by a singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.newton_schulz.coefficients import Coefficients, compose

SMALLEST = 1e-15  # norms below it count as this: squares of fp32 numbers vanish there


def newton_schulz_reference(x: Tensor, coefficients: Coefficients) -> Tensor:
    """x = U diag(s) V^T -> U diag(p(s / ||x||_F)) V^T, by way of fp64. x [..., m, n]. Returns x's dtype."""
    wide = x.double()
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_min(SMALLEST)
    u, s, vt = torch.linalg.svd(wide / norm, full_matrices=False)
    return ((u * compose(s, coefficients).unsqueeze(-2)) @ vt).to(x.dtype)
