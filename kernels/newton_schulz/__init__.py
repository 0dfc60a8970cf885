"""Newton-Schulz: the orthogonal factor of a matrix, nearly, by products alone. What the Muon optimizer does to its momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.newton_schulz.chunked import flops
from kernels.newton_schulz.coefficients import COEFFICIENTS, Coefficients, band, compose, resolve

__all__ = ["COEFFICIENTS", "FORMS", "Coefficients", "band", "compose", "cost", "newton_schulz", "resolve"]

FORMS = (
    Form("triton", "kernels.newton_schulz.triton", "newton_schulz_triton", triton_objection),
    Form("chunked", "kernels.newton_schulz.chunked", "newton_schulz_chunked"),
    Form("reference", "kernels.newton_schulz.reference", "newton_schulz_reference"),
)


@torch.no_grad()
def newton_schulz(x: Tensor, coefficients: str | Sequence[Sequence[float]] = "tuned") -> Tensor:
    """U diag(p(s)) V^T for x / ||x||_F = U diag(s) V^T, with p a composition of odd quintics: nearly U V^T.

    x [..., m, n], floating point; each of the matrices by itself. coefficients: a name in COEFFICIENTS, or triples (a, b, c).
    Returns x's shape and dtype, in which the products are made (sums in fp32): bf16 is what large models use. The scale of x does
    not matter, and zero stays zero. No gradient. Source: K. Jordan et al. 2024, Muon. Raises ValueError for what is no matrix.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must hold floating-point matrices [..., m, n], got {x.dtype} {tuple(x.shape)}")
    m, n = x.shape[-2:]
    triples = resolve(coefficients)
    form = choose(FORMS, Request("newton_schulz", x.device, x.dtype, {"M": m, "N": n}))
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(x, triples)


def cost(m: int, n: int, steps: int = 5) -> float:
    """Operations (2 a multiply-add) that one m x n matrix takes in the cheaper form, for sharing out work."""
    return min(flops(m, n, steps, gram, half=True) for gram in (False, True))
