"""Odd quintic polynomials whose composition takes singular values in (0, 1] to about one.

    s -> a s + b s^3 + c s^5, once for each (a, b, c)

quintic: one polynomial five times, steep at zero and loose around one (K. Jordan, 2024, the Muon optimizer). tuned: five
polynomials found together, which lift small values as fast and end close to one (as in the reference form of gram-newton-schulz,
Dao-AILab). polar_express: each the best one for the interval that those before it leave, from [0.001, 1] on (Amsel et al. 2025,
arXiv 2505.16932, algorithm 1; here without their safety factor, since a matrix is divided by its Frobenius norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]
Named = Literal["tuned", "quintic", "polar_express"]

COEFFICIENTS: dict[str, Coefficients] = {
    "tuned": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.287212, -23.595887, 17.300387),
        (4.107059, -2.947850, 0.544843),
        (3.948691, -2.908902, 0.551819),
        (3.318420, -2.488488, 0.510049),
        (2.300652, -1.668904, 0.418807),
    ),
}


def resolve(coefficients: str | Sequence[Sequence[float]]) -> Coefficients:
    """The polynomials of a name, or those given. Raises ValueError for an unknown name or what is no list of triples."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients={coefficients!r}: choose one of {', '.join(COEFFICIENTS)}, or give triples")
        return COEFFICIENTS[coefficients]
    if not coefficients or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(f"coefficients must be one or more triples (a, b, c), got {coefficients!r}")
    return tuple((float(a), float(b), float(c)) for a, b, c in coefficients)


def compose(s: Tensor, coefficients: Coefficients) -> Tensor:
    """What the polynomials, one after the other, make of singular values s, any shape."""
    for a, b, c in coefficients:
        square = s * s
        s = s * (a + square * (b + square * c))
    return s


def band(coefficients: str | Sequence[Sequence[float]], lowest: float) -> tuple[float, float]:
    """(smallest, largest) of what the polynomials make of singular values between `lowest` and 1."""
    s = torch.logspace(torch.tensor(lowest).log10().item(), 0, 20001, dtype=torch.float64)
    image = compose(s, resolve(coefficients))
    return image.min().item(), image.max().item()
