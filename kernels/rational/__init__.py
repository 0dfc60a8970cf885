"""A learned rational activation, its coefficients shared by groups of channels: the safe Padé form.

    phi(x) = (a_0 + a_1 x + ... + a_P x^P) / (1 + |b_1 x + ... + b_Q x^Q|)

Sources: Molina et al. 2019 (1907.06732), equation 3; groups and the use in a transformer: KAT, Yang and Wang 2024
(2409.10594). Coefficient gradients are reduced in blocks before they are added up, never element by element
(FlashKAT, 2505.13813).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, eager_objection, triton_objection

__all__ = ["FORMS", "rational"]

FORMS = (
    Form("triton", "kernels.rational.triton", "rational_triton", triton_objection),
    Form("chunked", "kernels.rational.chunked", "rational_chunked", eager_objection),
    Form("reference", "kernels.rational.reference", "rational_reference"),
)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """phi of every element of x; channels fall into G equal groups of neighbours, one set of coefficients a group.

    Args:
        x: [..., D]. Computed in fp32 at least: |x|^P and |x|^Q have to fit there (order 5: |x| below 5e7).
        numerator: [G, P + 1], a_0 first; or [1, P + 1], shared by all groups.
        denominator: [G, Q], b_1 first; or [1, Q].

    Where the polynomial in the denominator is zero, its absolute value counts as rising with it (derivative +1), so that
    coefficients that start at zero can leave it. The denominator is one at least and is never squared. Only the inputs are kept
    for the backward, which evaluates the polynomials again and gives the same bits every time.

    Returns x's shape and dtype. Raises ValueError naming the argument that does not fit.
    """
    _check(x, numerator, denominator)
    D = x.shape[-1]
    shape = {
        "rows": x.numel() // D,
        "D": D,
        "G": max(numerator.shape[0], denominator.shape[0]),
        "P": numerator.shape[1] - 1,
        "Q": denominator.shape[1],
    }
    form = choose(FORMS, Request("rational", x.device, x.dtype, shape))
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(x, numerator, denominator)


def _check(x: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., D] with D >= 1, got {x.dtype} {tuple(x.shape)}")
    for name, coefficients in (("numerator", numerator), ("denominator", denominator)):
        if coefficients.dim() != 2 or 0 in coefficients.shape or not coefficients.is_floating_point():
            raise ValueError(
                f"{name} must be floating point [groups or 1, coefficients], "
                f"got {coefficients.dtype} {tuple(coefficients.shape)}"
            )
        if coefficients.device != x.device:
            raise ValueError(f"{name} is on {coefficients.device}, x is on {x.device}: move it there")
    groups = max(numerator.shape[0], denominator.shape[0])
    if {numerator.shape[0], denominator.shape[0]} - {1, groups}:
        raise ValueError(
            f"numerator has {numerator.shape[0]} groups and denominator {denominator.shape[0]}: "
            "give both the same number, or one of them 1"
        )
    if x.shape[-1] % groups:
        raise ValueError(f"x has D = {x.shape[-1]} channels, which {groups} groups do not divide")
