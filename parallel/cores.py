"""Sets of a host's cores, as Linux writes them."""

from __future__ import annotations


def members(text: str) -> set[int]:
    """The kernel's lists: "0-3,8" -> {0, 1, 2, 3, 8}. Raises ValueError for anything else."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found
