"""The check's data: exact answers in every dtype, and faults that cannot hide."""

from __future__ import annotations

import pytest
import torch

from parallel.bench import pattern
from parallel.bench.sweep import DTYPES


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 100, 121, 1000])
@pytest.mark.parametrize("redop", ["sum", "prod", "min", "max"])
def test_reductions_are_exact_in_every_dtype(redop: str, ranks: int) -> None:
    tables = [pattern.table(rank, ranks, redop, 0) for rank in range(ranks)]
    wide = pattern.answer(ranks, redop, 0)
    for dtype in DTYPES.values():
        total = tables[0].to(dtype)
        for values in tables[1:]:
            other = values.to(dtype)
            if redop == "sum":
                total = total + other
            elif redop == "prod":
                total = total * other
            else:
                total = torch.minimum(total, other) if redop == "min" else torch.maximum(total, other)
        assert torch.equal(total.long(), wide), dtype
        assert wide.max() < pattern.NEVER


@pytest.mark.parametrize("ranks", [2, 8, 100, 1000])
@pytest.mark.parametrize("redop", ["sum", "prod"])
def test_every_rank_counts_somewhere(redop: str, ranks: int) -> None:
    neutral = 0 if redop == "sum" else 1
    for rank in range(ranks):
        assert (pattern.table(rank, ranks, redop, 0) != neutral).any(), rank


def test_rounds_and_ranks_differ() -> None:
    first = pattern.table(0, 4, "sum", 0)
    assert (first != pattern.table(1, 4, "sum", 0)).float().mean() > 0.8
    assert (first != pattern.table(0, 4, "sum", 1)).float().mean() > 0.8


@pytest.mark.parametrize("size", [1, 250, 251, 252, 1000, 5000])
@pytest.mark.parametrize("offset", [0, 1, 251, 300])
def test_filled_is_right_and_every_changed_element_is_counted(
    size: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern, "CHUNK", 600)  # several chunks
    values = pattern.table(3, 4, "max", 0)
    x = torch.empty(size, dtype=torch.bfloat16)
    pattern.fill(x, values, offset)
    assert x.tolist() == [values[(offset + i) % pattern.PERIOD].item() for i in range(size)]
    assert pattern.wrong(x, values, offset) == 0
    x[size // 2] += 1
    x[-1] = float("nan")
    assert pattern.wrong(x, values, offset) == len({size // 2, size - 1})


def test_a_shift_by_a_power_of_two_shows() -> None:
    values = pattern.table(0, 2, "max", 0)
    x = torch.empty(4096)
    pattern.fill(x, values)
    for shift in (1, 2, 64, 1024, 4096):
        assert pattern.wrong(x, values, shift) > 3500


def test_tolerance_is_relative_and_nan_is_never_within() -> None:
    values = torch.full((pattern.PERIOD,), 100.0, dtype=torch.float64)
    x = torch.full((300,), 100.05)
    assert pattern.wrong(x, values, 0, 1e-3) == 0
    assert pattern.wrong(x, values, 0, 1e-4) == 300
    x[7] = float("nan")
    assert pattern.wrong(x, values, 0, 1e-3) == 1
