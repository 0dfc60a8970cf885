"""Lists on the command line: names, and numbers with their ranges."""

from __future__ import annotations

import re
from collections.abc import Sequence

UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def names(option: str, given: str | Sequence[str], valid: Sequence[str]) -> list[str]:
    """Names, separated by commas. Raises ValueError for an unknown one; one named twice counts once."""
    words = [word for text in ([given] if isinstance(given, str) else given) for word in text.split(",") if word]
    for word in words:
        if word not in valid:
            raise ValueError(f"{option}: {word!r} is unknown; choose among {', '.join(valid)}")
    if not words:
        raise ValueError(f"{option}: no name is given; choose among {', '.join(valid)}")
    return list(dict.fromkeys(words))


def integers(option: str, text: str, *, factor: int) -> list[int]:
    """Numbers such as 512,3K or a range such as 64K:4G or 64K:4G:2 (each `factor` times the one before), ascending.

    K, M and G are powers of 1024. A range ends at the last number that is not above its end. Raises ValueError.
    """
    found: set[int] = set()
    for part in text.split(","):
        bounds = part.split(":")
        if len(bounds) == 1:
            found.add(_integer(option, part))
            continue
        if len(bounds) > 3:
            raise ValueError(
                f"{option}: {part!r} is not a range; write FIRST:LAST or FIRST:LAST:FACTOR, such as 64K:4G:2"
            )
        first, last = _integer(option, bounds[0]), _integer(option, bounds[1])
        step = _integer(option, bounds[2]) if len(bounds) == 3 else factor
        if last < first or step < 2:
            raise ValueError(f"{option}: the range {part!r} must go up, by a factor of at least 2")
        while first <= last:
            found.add(first)
            first *= step
    return sorted(found)


def _integer(option: str, text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), flags=re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{option}: {text!r} is not a size; write a number such as 4096, or 4K, 64M, 2G")
    return int(match[1]) << UNITS[match[2].upper()]
