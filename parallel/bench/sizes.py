"""Message sizes: read from the command line, and written for people. Powers of 1024, as nccl-tests reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FORMS = (
    "a size is a number of bytes with an optional K, M, G or T (powers of 1024; KiB and so on too): 4096, 64K, 1.5M; "
    "--sizes takes one size, a range 1K:8G that grows by --factor, or several of these separated by commas: 4K,1M:64M"
)


def parse_size(text: str) -> int:
    """Bytes of `64K`, `1.5MiB` or `4096`. Raises ValueError that names the accepted forms."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:I?B)?|B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is no size: {FORMS}")
    size = float(match[1]) * UNITS[match[2] or ""]
    if size < 1 or size != int(size):
        raise ValueError(f"{text!r} is {size:g} bytes, but messages have whole bytes, at least 1: {FORMS}")
    return int(size)


def parse_sizes(text: str, factor: float = 2) -> list[int]:
    """Sizes in ascending order, each once, of `1K:8G`, `4K,64K` or a mixture. Raises ValueError that names the accepted forms."""
    if factor <= 1:
        raise ValueError(f"--factor {factor:g} does not grow: choose a number above 1, such as 2 or 4")
    sizes: set[int] = set()
    for part in text.split(","):
        ends = part.split(":")
        if len(ends) > 2:
            raise ValueError(f"{part!r} has {len(ends) - 1} colons; the step of a range is --factor: {FORMS}")
        first, last = parse_size(ends[0]), parse_size(ends[-1])
        if last < first:
            raise ValueError(
                f"the range {part} ends before it begins; write the smaller size first: {ends[1]}:{ends[0]}"
            )
        size = float(first)
        while size <= last:
            sizes.add(round(size))
            size *= factor
    return sorted(sizes)


def show(size: float) -> str:
    """`64 KiB`, `1.5 MiB`, `100 B`: bytes for people."""
    for unit in ("T", "G", "M", "K"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit}iB"
    return f"{size:g} B"


def span(sizes: Iterable[int]) -> str:
    """`1 KiB to 64 MiB`, or the one size."""
    ordered = sorted(sizes)
    return show(ordered[0]) if len(ordered) == 1 else f"{show(ordered[0])} to {show(ordered[-1])}"
