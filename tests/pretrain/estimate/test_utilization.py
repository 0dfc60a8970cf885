"""Shares of ceilings: by hand, and what is said of those above one."""

from __future__ import annotations

import pytest

from pretrain.estimate.flops import Work
from pretrain.estimate.utilization import of_chip, share


def test_shares_by_hand() -> None:
    utilization = of_chip(100e12, 80e12, "mi300x.yaml")
    assert utilization.of(Work(20e12), 0.5) == ({"mfu": 0.4, "mfu_measured": 0.5}, [])
    assert utilization.of(Work(40e12), 0.5) == ({"mfu": 0.8, "mfu_measured": 1.0}, [])  # all of it is possible
    unknown = {"mfu": None, "mfu_measured": 0.5}
    assert of_chip(None, 2e30, "").of(Work(1e30), 1.0) == (unknown, [])
    assert not utilization.faulty


def test_more_than_the_whole_is_an_error_and_no_number() -> None:
    utilization = of_chip(100e12, 80e12, "mi300x.yaml")
    shares, news = utilization.of(Work(45e12), 0.5)
    assert shares == {"mfu": 0.9, "mfu_measured": None}
    assert [each.ceiling.name for each in news] == ["mfu_measured"]
    assert (
        "4.5e+13 FLOPs in 0.5 s are 90 TFLOP/s, more than the 80 that products were measured to reach" in news[0].text
    )
    assert "python -m kernels.bench hardware --write" in news[0].text
    shares, news = utilization.of(Work(125e12), 0.5)
    assert shares == {"mfu": None, "mfu_measured": None}
    assert [each.ceiling.name for each in news] == ["mfu"]  # the other was said
    assert "250 TFLOP/s, more than the 100 that mi300x.yaml says the chip can do" in news[0].text
    assert "hardware=..." in news[0].text and utilization.faulty == {"mfu", "mfu_measured"}
    assert utilization.of(Work(125e12), 0.5)[1] == []
    assert utilization.of(Work(5e12), 0.5) == ({"mfu": 0.1, "mfu_measured": 0.125}, [])  # the next step may be right


@pytest.mark.parametrize("kind", ["idle", "recomputed", "remade", "update"])
def test_all_that_is_computed_is_held_against_the_ceiling(kind: str) -> None:
    """90 % of useful work beside 30 % of recomputation is as impossible as 120 %."""
    assert share(Work(90.0), 1.0, 100.0) == 0.9
    assert share(Work(90.0, **{kind: 10.0}), 1.0, 100.0) == 0.9
    assert share(Work(90.0, **{kind: 30.0}), 1.0, 100.0) is None
