"""Newton-Schulz against the singular value decomposition: both forms, awkward shapes, spectra that are hard in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.newton_schulz import COEFFICIENTS, band, chunked, compose, cost, newton_schulz, resolve
from kernels.newton_schulz.chunked import flops, newton_schulz_chunked, symmetric_product
from kernels.newton_schulz.reference import newton_schulz_reference
from tests.kernels.interpreter import run_interpreted

TUNED = COEFFICIENTS["tuned"]


def matrix(m: int, n: int, kind: str, seed: int = 0) -> Tensor:
    """fp64 [m, n], m <= n, with a spectrum of this kind."""
    torch.manual_seed(seed)
    if kind == "random":
        return torch.randn(m, n, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]
    s = {
        "decaying": torch.logspace(0, -6, m),
        "low rank": torch.cat([torch.ones(m // 8), torch.full((m - m // 8,), 1e-12)]),
        "one large": torch.cat([torch.ones(1), torch.full((m - 1,), 1e-2)]),
    }[kind]
    return u * s.double() @ v.mT


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 5), (7, 3), (3, 40), (2, 3, 6, 9), (0, 4, 5), (33, 20)])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_form_is_the_definition(shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    expected = newton_schulz_reference(x, resolve(name))
    for gram in (True, False):
        found = newton_schulz_chunked(x, resolve(name), gram)
        assert found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(newton_schulz(x, name), expected, rtol=0, atol=1e-9)


def test_the_reference_acts_on_singular_values() -> None:
    """By hand: diag(3, 4) has norm 5; with one polynomial (1, 1, 0), s + s^3 of 0.6 and 0.8."""
    x = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
    for form in (newton_schulz_reference, newton_schulz_chunked):
        torch.testing.assert_close(form(x, ((1.0, 1.0, 0.0),)), torch.tensor([[0.816, 0, 0], [0, 1.312, 0]]))


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    x = matrix(12, 20, "random").float()
    expected = newton_schulz(x)
    for scale in (2.0**-33, 2.0**33):
        assert torch.equal(newton_schulz(scale * x), expected)
    assert not newton_schulz(torch.zeros(2, 5, 8)).any()
    assert (
        newton_schulz(1e-25 * x).abs().max() < 1e-3
    )  # below what fp32 can take a norm of: nothing, not something large


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("kind", ["random", "decaying", "low rank", "one large"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 4e-5), (torch.bfloat16, 0.25)])
def test_hard_spectra(gram: bool, kind: str, dtype: torch.dtype, limit: float) -> None:
    """Singular values down to rounding: what is lifted from there is anyone's guess, but nothing may become larger than one."""
    x = matrix(64, 256, kind)
    expected = newton_schulz_reference(x, TUNED)
    found = newton_schulz_chunked(x.to(dtype), TUNED, gram).double()
    assert torch.linalg.svdvals(found).max() < 1.18
    known = torch.linalg.svdvals(x / x.norm()) > (1e-2 if dtype == torch.bfloat16 else 0)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    assert error((u.mT @ found @ vt.mT)[known][:, known], (u.mT @ expected @ vt.mT)[known][:, known]) < limit


def test_without_a_restart_the_gram_form_explodes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix(64, 256, "decaying").bfloat16()
    assert torch.linalg.svdvals(newton_schulz_chunked(x, TUNED, True).double()).max() < 1.18
    monkeypatch.setattr(chunked, "RESTART", 99)
    assert torch.linalg.svdvals(newton_schulz_chunked(x, TUNED, True).double()).max() > 100


@pytest.mark.parametrize(("m", "n"), [(512, 512), (515, 700)])
def test_upper_blocks_are_mirrored(m: int, n: int) -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, m, n), torch.randn(2, m, m)
    c = c + c.mT
    whole = x.double() @ x.double().mT
    assert error(symmetric_product(x, x), whole) < 1e-6
    assert error(symmetric_product(x, x, 0.5), 0.5 * whole) < 1e-6
    found = symmetric_product(x, x, -2.0, c, 3.0, 7.0)
    assert error(found, -2 * whole + 3 * c.double() + 7 * torch.eye(m)) < 1e-6
    assert torch.equal(found, found.mT) or error(found, found.mT) < 1e-6


def test_bands() -> None:
    """What becomes of singular values between 0.01 (0.003) of the norm and all of it."""
    assert band("tuned", 1e-2) == pytest.approx((0.9778, 1.0318), abs=1e-4)
    assert band("tuned", 3e-3) == pytest.approx((0.9778, 1.1450), abs=1e-4)
    assert band("quintic", 1e-2) == pytest.approx((0.6818, 1.1344), abs=1e-4)
    assert band("polar_express", 1e-3) == pytest.approx((0.8764, 1.1236), abs=1e-4)


def test_polar_express_is_the_best_of_each_interval() -> None:
    """Its error levels out: the largest deviation from one is met on both sides, at both ends of what the steps before leave."""
    low, high = 1e-3, 1.0
    for triple in COEFFICIENTS["polar_express"]:
        s = torch.linspace(low, high, 100001, dtype=torch.float64)
        image = compose(s, (triple,))
        below, above = 1 - image.min().item(), image.max().item() - 1
        assert below == pytest.approx(above, rel=2e-3)
        assert image[0].item() == pytest.approx(image.min().item(), abs=1e-5)
        low, high = image.min().item(), image.max().item()
    assert (low, high) == pytest.approx((0.8764, 1.1236), abs=1e-4)


def test_operations_by_hand() -> None:
    assert flops(2, 3, 1, gram=False, half=False) == 2 * (12 + 8 + 12)  # A = X X^T, A^2, B X
    assert flops(4, 4, 5, gram=False, half=True) == 5 * 4**3 * (1 + 1 + 2)
    # Twice: X X^T, (R^2, P R P), (R^2, P Q), Q X; then X X^T, R^2, Q X.
    assert flops(2, 100, 5, gram=True, half=False) == 2 * (3 + 2 + 3 + 2 + 1) * 8 + 3 * 2 * 2 * 400
    assert flops(2, 100, 5, gram=True, half=True) == (3 + 2 + 3 + 2 + 1) * 8 + 3 * (1 + 2) * 400
    assert cost(64, 640) == flops(64, 640, 5, gram=True, half=True) == cost(640, 64)
    assert cost(1, 1) > 0


def test_the_form_with_fewer_operations_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for form in ("_gram", "_direct"):
        monkeypatch.setattr(chunked, form, lambda x, *rest, form=form: used.append(form) or x)
    for m, n in ((8, 8), (8, 80), (80, 8)):
        newton_schulz_chunked(torch.ones(m, n, dtype=torch.bfloat16), TUNED)
    assert used == ["_direct", "_gram", "_gram"]


@pytest.mark.parametrize(
    ("x", "coefficients", "text"),
    [
        (torch.ones(3), "tuned", "matrices"),
        (torch.ones(2, 2, dtype=torch.int64), "tuned", "floating-point"),
        (torch.ones(2, 2), "best", "tuned, quintic, polar_express"),
        (torch.ones(2, 2), [(1.0, 2.0)], "triples"),
    ],
)
def test_refused(x: Tensor, coefficients: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        newton_schulz(x, coefficients)  # type: ignore[arg-type]


def test_the_triton_form_under_the_interpreter() -> None:
    run_interpreted(__file__, "triton_newton_schulz_interpreted.py")
