from __future__ import annotations

import math

import pytest

from launch.plan.failures import LLAMA_NODE_MTBF, daly, efficiency, failures, young


def test_young_by_hand() -> None:
    assert young(60.0, 86400.0) == pytest.approx(math.sqrt(2 * 60 * 86400))
    assert young(60.0, 86400.0) == pytest.approx(3219.94, rel=1e-5)


def test_daly_by_hand() -> None:
    # save/(2 M) = 1/100: sqrt(2 * 2 * 100) * (1 + 0.1/3 + 0.01/9) - 2
    assert daly(2.0, 100.0) == pytest.approx(20.0 * (1 + 0.1 / 3 + 0.01 / 9) - 2.0)


def test_saves_longer_than_twice_the_time_between_failures() -> None:
    assert daly(200.0, 100.0) == daly(1000.0, 100.0) == 100.0


def test_without_failures_only_saves_cost() -> None:
    assert efficiency(99.0, 1.0, 1e9, 0.0) == pytest.approx(0.99, rel=1e-6)


def test_nothing_counts_where_failures_come_too_fast() -> None:
    assert efficiency(1e6, 1.0, 1.0, 0.0) == 0.0
    assert efficiency(1.0, 1.0, 1.0, 1e6) == 0.0
    assert efficiency(0.0, 1.0, 1.0, 1.0) == 0.0


@pytest.mark.parametrize(("save", "mtbf"), [(1.0, 1e5), (60.0, 7200.0), (300.0, 3600.0)])
def test_daly_is_the_best_interval_there_is(save: float, mtbf: float) -> None:
    best = max(efficiency(mtbf * n / 2000, save, mtbf, 100.0) for n in range(1, 8000))
    assert efficiency(daly(save, mtbf), save, mtbf, 100.0) == pytest.approx(best, rel=2e-3)
    assert efficiency(daly(save, mtbf), save, mtbf, 100.0) <= best * (1 + 1e-6)


def test_interval_is_in_steps_and_never_below_what_writing_takes() -> None:
    found = failures(10, 1e6, 2.0, 0.0, 60.0, 3.0, 1000)
    assert found.mtbf == 1e5
    assert found.per_day == pytest.approx(0.864)
    assert found.steps == round(daly(2.0, 1e5) / 3.0)
    assert found.interval == found.steps * 3.0
    assert failures(10, 1e6, 2.0, 5000.0, 60.0, 3.0, 1000).steps == round(5000 / 3)
    assert failures(100_000, 3600.0, 2.0, 0.0, 60.0, 1e4, 10).steps == 1


def test_the_best_interval_beats_the_configured_one() -> None:
    found = failures(128, LLAMA_NODE_MTBF, 5.0, 0.0, 300.0, 2.5, 100_000)
    assert 0.0 < found.configured < found.efficiency < 1.0


def test_llama_node() -> None:
    hours = LLAMA_NODE_MTBF / 3600
    assert hours == pytest.approx(6335, rel=1e-3)
