"""The symmetric product in Triton, and Newton-Schulz with it, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.newton_schulz import COEFFICIENTS, newton_schulz
from kernels.newton_schulz.reference import newton_schulz_reference
from kernels.newton_schulz.triton import DEFAULTS, corner, newton_schulz_triton, settle, symmetric_product_triton
from kernels.tuning import override

SMALL = {"BLOCK": 16, "BLOCK_K": 16}


@triton.jit
def _corners(places, guesses, rows, columns, GUESSED: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    p = tl.load(places + at)
    if GUESSED:
        i, j = settle(p, tl.load(guesses + at))
    else:
        i, j = corner(p)
    tl.store(rows + at, i)
    tl.store(columns + at, j)


def corners(places: torch.Tensor, guesses: torch.Tensor | None = None) -> torch.Tensor:
    rows, columns = torch.empty_like(places), torch.empty_like(places)
    given = places if guesses is None else guesses
    _corners[(1,)](places, given, rows, columns, guesses is not None, places.numel())
    return torch.stack([rows, columns], dim=-1)


LISTED = torch.tensor([(i, j) for i in range(64) for j in range(i + 1)][:2048], dtype=torch.int32)


def test_tiles_are_counted_row_by_row() -> None:
    assert torch.equal(corners(torch.arange(2048, dtype=torch.int32)), LISTED)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_root_that_is_one_row_off_is_mended(off: int) -> None:
    """As on devices whose roots are approximate; the interpreter's are not."""
    found = corners(torch.arange(2048, dtype=torch.int32), (LISTED[:, 0] + off).contiguous())
    assert torch.equal(found, LISTED)


def test_the_ends_of_long_rows() -> None:
    """Both ends of 32768 rows, up to p = 2^29: the root in fp32 is a row too far before the beginning of many."""
    i = torch.arange(2**15, dtype=torch.int32)
    first, last = i * (i + 1) // 2, i * (i + 1) // 2 + i
    assert torch.equal(corners(first), torch.stack([i, 0 * i], dim=-1))
    assert torch.equal(corners(last), torch.stack([i, i], dim=-1))


@pytest.mark.parametrize(("m", "k"), [(1, 1), (16, 16), (50, 37), (33, 100), (100, 20)])
@pytest.mark.parametrize("add", [False, True])
def test_product(m: int, k: int, add: bool) -> None:
    """Strided operands, sizes that no tile divides; tiles below the diagonal are those above it."""
    torch.manual_seed(0)
    wide = torch.randn(2, k, m + 3)
    a = wide[:, :, :m].mT
    c = torch.randn(2, m, m + 2)[:, :, :m]  # rows apart
    c += c.mT.clone()
    with override({"symmetric_product": SMALL}):
        found = symmetric_product_triton(a, a, 0.5, c if add else None, -3.0, 2.0)
    expected = 0.5 * (a.double() @ a.double().mT) + (-3.0 * c.double() if add else 0) + 2 * torch.eye(m)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    tile = torch.arange(m) // SMALL["BLOCK"]
    # A tile on the diagonal is as symmetric as the sums of the library that multiplied it.
    mirrored = tile[:, None] != tile
    assert torch.equal(found[:, mirrored], found.mT[:, mirrored])


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
