"""The result rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from parallel.fabric.topology import factor


@dataclass(frozen=True)
class Row:
    """One op, group shape, dtype, place and size. Times in microseconds, bandwidths in GB/s (1e9 bytes).

    bytes: S by the convention of nccl-tests. microseconds: mean over iterations of the time of the last rank. algbw, busbw: None
    where nothing moves (barrier), busbw also where there is one rank. wrong: elements over all ranks, None when not checked.
    error: half-width of the mean's 95% confidence interval, relative; None below 20 iterations.
    """

    op: str
    group: str
    ranks: int
    bytes: int
    count: int
    dtype: str
    in_place: bool
    microseconds: float
    p50: float
    p95: float
    p99: float
    min: float
    max: float
    error: float | None
    algbw: float | None
    busbw: float | None
    wrong: int | None
    iterations: int
    backend: str
    redop: str | None
    root: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bandwidths(definition: str, ranks: int, size: int, microseconds: float) -> tuple[float | None, float | None]:
    """(algbw, busbw) of S = `size` bytes by nccl-tests' definitions; None where there is none."""
    if not size or microseconds <= 0:
        return None, None
    algbw = size / microseconds / 1e3
    return algbw, algbw * factor(definition, ranks) if ranks > 1 else None
