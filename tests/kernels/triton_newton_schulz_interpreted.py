"""The symmetric product in Triton, and Newton-Schulz with it, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.newton_schulz import COEFFICIENTS, newton_schulz
from kernels.newton_schulz.reference import newton_schulz_reference
from kernels.newton_schulz.triton import DEFAULTS, newton_schulz_triton, symmetric_product_triton
from kernels.tuning import override

SMALL = {"BLOCK": 16, "BLOCK_K": 16}


@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 16), (50, 37), (33, 100)])
@pytest.mark.parametrize("add", [False, True])
def test_product(m: int, k: int, add: bool) -> None:
    """Strided operands, sizes that no tile divides; below the diagonal stands what is above it."""
    torch.manual_seed(0)
    wide = torch.randn(2, k, m + 3)
    a = wide[:, :, :m].mT
    c = torch.randn(2, m, m + 2)[:, :, :m]  # rows apart
    c += c.mT.clone()
    with override({"symmetric_product": SMALL}):
        found = symmetric_product_triton(a, a, 0.5, c if add else None, -3.0, 2.0)
    expected = 0.5 * (a.double() @ a.double().mT) + (-3.0 * c.double() if add else 0) + 2 * torch.eye(m)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("shape", [(20, 20), (3, 40, 18), (1, 5)])
def test_iteration(gram: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    with override({"symmetric_product": SMALL}):
        found = newton_schulz_triton(x, COEFFICIENTS["tuned"], gram)
    torch.testing.assert_close(found, newton_schulz_reference(x, COEFFICIENTS["tuned"]), rtol=0, atol=2e-5)


def test_it_is_chosen() -> None:
    x = torch.randn(6, 9)
    assert DEFAULTS["symmetric_product"]
    torch.testing.assert_close(newton_schulz(x), newton_schulz_reference(x, COEFFICIENTS["tuned"]), rtol=0, atol=2e-5)
