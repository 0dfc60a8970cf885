"""Numbers for people."""

from __future__ import annotations


def human(number: float, digits: int = 3) -> str:
    """1234567 -> 1.23M; to so many digits, in units up to E."""
    rounded_up = 1 - 0.5 * 10.0**-digits  # what is rounded up to the unit is one of it
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= rounded_up * size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"
