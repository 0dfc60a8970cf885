"""The Triton form of CCA's queries and keys against the definition in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import tuning
from kernels.cca import triton as form
from kernels.cca.reference import cca_reference
from tests.kernels.cca_cases import Sizes, draw, parameters, values_and_gradients

# Several tiles a span, several spans a row, several parts of a tap.
SMALL = {"ELEMENTS": 256, "ROWS": 32, "WAVES": 6}
CASES = [
    # sizes, rows, tokens, borders, state, small tiles
    (Sizes(4, 2, 6, 2, 2), 2, 37, None, False, False),
    (Sizes(2, 1, 20, 2, 2), 2, 19, None, True, True),
    (Sizes(1, 1, 5, 4, 3), 1, 24, [0, 0, 7, 8, 24, 24], True, True),
    (Sizes(2, 2, 16, 1, 1), 2, 5, None, True, False),
    (Sizes(1, 1, 20, 3, 1), 1, 33, [0, 16, 17, 33], True, True),
    (Sizes(4, 2, 16, 1, 4), 2, 2, None, True, True),
]


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    for table in form.DEFAULTS.values():
        small = {name: value for name, value in SMALL.items() if name in table["generic"]}
        patch.setitem(table, "generic", {**table["generic"], **small})


@pytest.fixture(autouse=True)
def looked_up_again() -> None:
    tuning.forget()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.param:
        small_tiles(monkeypatch)


@pytest.mark.parametrize("sizes, B, T, borders, state, tiles", CASES, indirect=["tiles"])
def test_values_and_gradients(
    sizes: Sizes, B: int, T: int, borders: list[int] | None, state: bool, tiles: None
) -> None:
    compare(sizes, B, T, borders, state)


def compare(sizes: Sizes, B: int, T: int, borders: list[int] | None, state: bool) -> None:
    N = B if borders is None else len(borders) - 1
    before = draw(N, sizes.reach, sizes.channels, seed=5, dtype=torch.float32) if state else None
    z, given = draw(B, T, sizes.channels, dtype=torch.float32), parameters(sizes, torch.float32)
    ours = values_and_gradients(form.cca_triton, z, given, before, borders)
    wide = None if before is None else before.double()
    exact = values_and_gradients(cca_reference, z.double(), [x.double() for x in given], wide, borders)
    for name, value in exact.items():
        assert ours[name].dtype == torch.float32
        size = value.norm() if name != "factor" else _summed(exact["k"], given[-1].double())
        assert (ours[name].double() - value).norm() <= 2e-6 * size, name


def _summed(k: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Size of what the factor's gradient is a sum of, dk · k / factor of each token: a sum of few terms may nearly vanish, and
    its rounding does not."""
    upstream = draw(*k.shape, seed=21, dtype=torch.bfloat16).to(torch.float16).double()
    return (upstream * k / factor[:, None]).sum(-1).abs().sum((0, 1)).norm()


def test_small_tiles_make_every_kind_of_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 tiles of 16 tokens in 2 spans, 2 parts of a tap."""
    seen = {}
    launch = form.tap_gradient_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            def call(*arguments: object, **options: object) -> object:
                seen.update(options, grid=grid, together=arguments[8], rows=arguments[3].shape[0])
                return launch[grid](*arguments, **options)

            return call

    monkeypatch.setattr(form, "tap_gradient_kernel", Recorder())
    small_tiles(monkeypatch)
    compare(Sizes(2, 1, 24, 2, 2), 1, 61, [0, 1, 1, 3, 38, 61], False)
    assert (seen["BLOCK_T"], seen["BLOCK_K"], seen["together"], seen["rows"]) == (16, 16, 2, 2)


def test_fp16_errs_by_its_roundings() -> None:
    sizes = Sizes(2, 1, 16, 2, 2)
    z, given = draw(1, 40, sizes.channels, dtype=torch.float16), parameters(sizes, torch.float32)
    ours = values_and_gradients(form.cca_triton, z, given, None, [0, 30, 40])
    exact = values_and_gradients(cca_reference, z.double(), [x.double() for x in given], None, [0, 30, 40])
    for name, value in exact.items():
        assert ours[name].dtype == (torch.float16 if name in ("q", "k", "z") else torch.float32)
        assert (ours[name].double() - value).norm() < 2.5e-3 * value.norm(), name


def test_slices_and_no_tokens() -> None:
    sizes = Sizes(4, 2, 6, 2, 2)
    wide, given = draw(2, 9, 60, dtype=torch.float32), parameters(sizes, torch.float32)
    for a, b in zip(
        form.cca_triton(wide[..., 12:48], *given), form.cca_triton(wide[..., 12:48].contiguous(), *given), strict=True
    ):
        assert torch.equal(a, b)
    none = values_and_gradients(form.cca_triton, wide[:, :0, 12:48], given)
    assert none["q"].shape == (2, 0, 4, 6) and not none["grouped"].any()
