"""What a row says about its iterations: pure arithmetic on microseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

BATCHES = 10
STUDENT = 2.262  # the two-sided 95% point of Student's t with BATCHES - 1 degrees of freedom


class Summary(NamedTuple):
    """microseconds: the mean; error: the half-width of the mean's 95% confidence interval over the mean (None: too few
    iterations).
    """

    microseconds: float
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    error: float | None


def summarize(times: Sequence[float]) -> Summary:
    """Of at least one time. Percentiles by nearest rank, as nccl-tests takes them."""
    ordered = sorted(times)
    p50, p95, p99 = (percentile(ordered, share) for share in (50, 95, 99))
    return Summary(math.fsum(ordered) / len(ordered), ordered[0], p50, p95, p99, ordered[-1], relative_error(times))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ascending values that at least `share` percent do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered) / 100) - 1)]


def increments(ends: Sequence[float]) -> list[float]:
    """Durations of iterations that began at 0 and ended at these ascending times."""
    return [after - before for before, after in pairwise([0.0, *ends])]


def relative_error(times: Sequence[float]) -> float | None:
    """Half-width of the 95% confidence interval of the mean, over the mean; None below 20 iterations.

    By the method of batch means: neighbouring iterations are not independent (a busy machine slows several in a row),
    means of ten long stretches nearly are.
    """
    size = len(times) // BATCHES
    if size < 2:
        return None
    used = times[len(times) - size * BATCHES :]
    means = [math.fsum(used[i : i + size]) / size for i in range(0, len(used), size)]
    mean = math.fsum(means) / BATCHES
    if mean <= 0:
        return None
    variance = math.fsum((value - mean) ** 2 for value in means) / (BATCHES - 1)
    return STUDENT * math.sqrt(variance / BATCHES) / mean
