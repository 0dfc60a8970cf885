"""Numbers for people."""

from __future__ import annotations

import pytest

from launch.plan import show
from pretrain.train import progress

NUMBERS = {
    0.0: ("0", "0"),
    12.0: ("12", "12"),
    999.4: ("999", "999.4"),
    999.6: ("1k", "999.6"),
    -1234.0: ("-1.23k", "-1.234k"),
    999_999.0: ("1M", "1M"),
    1_234_567.0: ("1.23M", "1.235M"),
    8.84e9: ("8.84G", "8.84G"),
    1.5e12: ("1.5T", "1.5T"),
    3.25e15: ("3.25P", "3.25P"),
    2e18: ("2E", "2E"),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_units(number: float) -> None:
    """Of the progress line, and of a plan."""
    assert (progress.human(number), show.human(number)) == NUMBERS[number]
