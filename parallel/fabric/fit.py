"""Measured collectives -> latency and bandwidth with their errors, the knee of the curve, and what follows for bucket sizes.

The model (Hockney's alpha-beta) is seconds = alpha + S * factor / beta: S by the convention of nccl-tests, beta the busbw. Noise
of timings is relative, so relative errors are what is made small, and a row that stands far from all others loses its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel.fabric.topology import factor

FEW = 5
LEVEL = 0.9  # share of the saturated bandwidth at which a curve counts as saturated
BENT = 0.10  # relative deviation that three neighbours share, beyond which rows do not follow the model
_Floats = NDArray[np.float64]


class Row(NamedTuple):
    """One measured size. bytes: S by the nccl-tests convention; group: a name such as "world" or "rail"."""

    op: str
    group: str
    ranks: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """One op in one group. Errors are standard errors; None where there are too few sizes to tell."""

    op: str
    group: str
    ranks: int
    sizes: int
    """How many sizes were fitted."""
    alpha_us: float
    alpha_error_us: float | None
    busbw_gbs: float | None
    """beta, GB/s (1e9 bytes); None where no size was large enough for bandwidth to show."""
    busbw_error_gbs: float | None
    half_bytes: float | None
    """S at which half of the bandwidth is reached: alpha * beta / factor."""
    knee_bytes: int | None
    """Smallest measured S at 90 % of the saturated bandwidth; None where no measured size is that large."""
    knee_estimate_bytes: float | None
    """Where the model says the knee is; also beyond the measured sizes."""
    follows: bool
    """Whether the rows follow the model. Where they do not (a change of protocol inside the range, caches), the knee is read
    off the smoothed rows."""
    spread: float
    """Relative scatter of the rows around the model, as a standard deviation that ignores outliers."""
    outliers: tuple[int, ...]
    """Sizes whose rows lie far from the model and had no weight."""

    def seconds(self, bytes: float) -> float:
        """The model's time for S bytes."""
        slope = 0.0 if self.busbw_gbs is None else factor(self.op, self.ranks) / (1e9 * self.busbw_gbs)
        return 1e-6 * self.alpha_us + slope * bytes


def fit(rows: Iterable[Row], level: float = LEVEL) -> list[Fit]:
    """One fit for each (op, group, ranks) with at least three sizes, in the order in which they come first.

    Several rows of one size count as one, their median. Groups of one rank have no bandwidth and are left out.
    level: what counts as saturated, 0 < level < 1. Raises ValueError for rows that cannot be (seconds <= 0, unknown ops).
    """
    if not 0 < level < 1:
        raise ValueError(
            f"level = {level}: should be a share of the saturated bandwidth between 0 and 1, such as {LEVEL}"
        )
    groups: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    for row in rows:
        if not (row.bytes > 0 and row.seconds > 0 and math.isfinite(row.seconds)):
            raise ValueError(f"{row}: bytes and seconds should be positive")
        if factor(row.op, row.ranks) > 0:
            sizes = groups.setdefault((row.op, row.group, row.ranks), {})
            sizes.setdefault(row.bytes, []).append(row.seconds)
    return [_fit(*key, sizes, level) for key, sizes in groups.items() if len(sizes) >= 3]


def _fit(op: str, group: str, ranks: int, sizes: dict[float, list[float]], level: float) -> Fit:
    order = sorted(sizes)
    size = np.array(order, dtype=np.float64)
    seconds = np.array([float(np.median(sizes[each])) for each in order])
    wire = size * factor(op, ranks)  # bytes that busbw counts
    line = straight(wire, seconds)
    ratio = np.log(seconds / (line.alpha + line.slope * wire))
    follows = not _bent(ratio, max(BENT, 2 * line.spread))
    half = estimate = None
    knee: float | None = None
    if line.slope > 0:
        half = line.alpha / line.slope / factor(op, ranks)
        estimate = half * level / (1 - level)
        if follows:
            knee = next((each for each in order if each >= estimate * (1 - 1e-9)), None)
    if not follows:
        # The rows as they are, without their scatter. Where the last ones still gain, the curve has not saturated.
        speed = wire / (line.alpha + line.slope * wire) / np.exp(_running_median(ratio))
        top = float(speed.max())
        if speed.argmax() < len(speed) - 1 or speed[-1] <= 1.1 * speed[-2]:
            knee = order[int(np.argmax(speed >= level * top))]
    return Fit(
        op=op,
        group=group,
        ranks=ranks,
        sizes=len(order),
        alpha_us=1e6 * line.alpha,
        alpha_error_us=None if line.alpha_error is None else 1e6 * line.alpha_error,
        busbw_gbs=1e-9 / line.slope if line.slope > 0 else None,
        busbw_error_gbs=1e-9 * line.slope_error / line.slope**2 if line.slope_error and line.slope > 0 else None,
        half_bytes=half,
        knee_bytes=None if knee is None else int(knee),
        knee_estimate_bytes=estimate,
        follows=follows,
        spread=line.spread,
        outliers=tuple(int(each) for each, weight in zip(order, line.weights) if weight == 0),
    )


class Line(NamedTuple):
    """seconds = alpha + slope * x. Errors are standard errors, None for fewer than three points."""

    alpha: float
    slope: float
    alpha_error: float | None
    slope_error: float | None
    spread: float
    weights: _Floats


def straight(x: _Floats, seconds: _Floats) -> Line:
    """The line through positive times that makes relative errors small, alpha >= 0 and slope >= 0; robust to outliers.

    Least squares of (t - line) / line, reweighted by Tukey's biweight (c = 4.685, scale by the median absolute deviation), which
    has 95 % of the efficiency of least squares when all errors are normal. Of fewer than FEW points none can be told to be an
    outlier: plain least squares. x, seconds: [N], N >= 2.
    """
    design = np.stack([np.ones_like(x), x], axis=1)
    few = max(1, len(x) // 4)  # where to begin: latency by the smallest sizes, bandwidth by the largest
    alpha = float(np.median(seconds[:few]))
    slope = max(0.0, float(np.median((seconds[-few:] - alpha) / x[-few:])))
    guess = np.array([alpha, slope])
    weights = np.ones_like(x)
    scale = 0.0
    for _ in range(60):
        line = np.maximum(design @ guess, 1e-12)
        relative = (seconds - line) / line
        scale = max(1.4826 * float(np.median(np.abs(relative))), 1e-9)
        weights = np.clip(1 - (relative / (4.685 * scale)) ** 2, 0, None) ** 2 if len(x) >= FEW else np.ones_like(x)
        better = _solve(design, seconds, weights / line**2)
        if np.allclose(better, guess, rtol=1e-10, atol=0):
            break
        guess = better
    line = np.maximum(design @ guess, 1e-12)
    relative = (seconds - line) / line
    errors = _errors(design / line[:, None], scale, relative) if len(x) > 2 else (None, None)
    return Line(float(guess[0]), float(guess[1]), *errors, scale if len(x) > 2 else 0.0, weights)


def _solve(design: _Floats, seconds: _Floats, weights: _Floats) -> _Floats:
    """Weighted least squares with both coefficients >= 0."""
    root = np.sqrt(weights)
    both = np.linalg.lstsq(design * root[:, None], seconds * root, rcond=None)[0]
    if (both >= 0).all():
        return both
    alone = [float((weights * seconds * column).sum() / (weights * column**2).sum()) for column in design.T]
    lines = [np.array([alone[0], 0.0]), np.array([0.0, alone[1]])]
    return min(lines, key=lambda line: float((weights * (seconds - design @ line) ** 2).sum()))


def _errors(design: _Floats, scale: float, residuals: _Floats) -> tuple[float | None, float | None]:
    """Standard errors: of a robust regression by Huber's formula, with the factor for few points; of few, the usual ones.

    design, residuals: relative ones.
    """
    points = len(residuals)
    if points < FEW:
        variance = float((residuals**2).sum()) / (points - 2)
    else:
        # psi and its derivative (u is the residual over the scale), from the weights (1 - v)^2 with v = (u / 4.685)^2
        v = np.minimum((residuals / (4.685 * scale)) ** 2, 1.0)
        psi_squared = float(((1 - v) ** 4 * v).sum()) * 4.685**2 / (points - 2)
        slope = float(((1 - v) * (1 - 5 * v)).mean())
        variance = scale**2 * psi_squared / max(slope, 0.1) ** 2
    try:
        covariance = np.linalg.inv(design.T @ design) * variance
    except np.linalg.LinAlgError:
        return None, None
    return math.sqrt(covariance[0, 0]), math.sqrt(covariance[1, 1])


def _bent(ratio: _Floats, limit: float) -> bool:
    """Whether three neighbours lie on the same side of the line, all further off than the limit: noise does not do that."""
    threes = np.lib.stride_tricks.sliding_window_view(ratio, 3)
    return bool((threes.min(1) > limit).any() or (threes.max(1) < -limit).any())


def _running_median(values: _Floats) -> _Floats:
    """The median of each value and its two neighbours either side; at the ends, of the last five."""
    starts = np.clip(np.arange(len(values)) - 2, 0, max(0, len(values) - 5))
    return np.array([np.median(values[start : start + 5]) for start in starts])


@dataclass(frozen=True)
class Bucket:
    """The recommended size of one kind of message."""

    use: str
    """gradients or parameters."""
    op: str
    group: str
    ranks: int
    bytes: int
    """S by the nccl-tests convention: the whole bucket, before it is cut into shards."""
    shard_bytes: int
    """What each rank keeps of it (reduce_scatter) or brings to it (all_gather); the same as `bytes` for all_reduce."""
    measured: bool
    """False: no measured size saturated the fabric, and this is the model's extrapolation."""
    reason: str


@dataclass(frozen=True)
class Advice:
    """bucket_bytes: for gradients; fusion_bytes: how much to fuse of small messages that are gathered. None: not measured."""

    bucket_bytes: int | None
    fusion_bytes: int | None
    buckets: tuple[Bucket, ...]
    notes: tuple[str, ...]


def advice(fits: Sequence[Fit], group: str | None = None) -> Advice:
    """Bucket sizes: the smallest size at which the fabric is saturated (arXiv 2511.17127, section III), a power of two.

    A larger bucket gains no bandwidth and delays the first overlap, a smaller one pays the latency more often. group: the one
    that gradients are summed over; the one with the most ranks when left out.
    """
    buckets: list[Bucket] = []
    notes: list[str] = []
    for use, ops in (("gradients", ("reduce_scatter", "all_reduce")), ("parameters", ("all_gather",))):
        for op in ops:
            found = [each for each in fits if each.op == op and group in (None, each.group)]
            if not found:
                continue
            chosen = max(found, key=lambda each: each.ranks)
            bucket = _bucket(use, chosen)
            if bucket is None:
                notes.append(f"{op} over {chosen.group}: too small sizes to see its bandwidth; measure larger ones")
                continue
            buckets.append(bucket)
            if not bucket.measured:
                notes.append(
                    f"{op} over {chosen.group}: not saturated at the largest measured size; measure up to "
                    f"{readable(4 * bucket.bytes)} to be sure"
                )
    first = {bucket.use: bucket.bytes for bucket in reversed(buckets)}
    if "gradients" not in first:
        where = "" if group is None else f" over {group}"
        notes.append(
            f"no bucket for gradients: measure reduce_scatter (sharded) or all_reduce (replicas){where}, three sizes or more"
        )
    return Advice(first.get("gradients"), first.get("parameters"), tuple(buckets), tuple(notes))


def _bucket(use: str, fit: Fit) -> Bucket | None:
    knee = fit.knee_bytes or fit.knee_estimate_bytes
    if not knee:
        return None
    size = 1 << math.ceil(math.log2(knee) - 1e-9)
    shard = size if fit.op == "all_reduce" else math.ceil(size / fit.ranks)
    where = f"{fit.op} over {fit.group} ({fit.ranks} ranks)"
    if fit.knee_bytes is not None:
        reason = f"{where} reaches 90 % of its bandwidth at {readable(fit.knee_bytes)}"
    else:
        reason = f"{where} would reach 90 % of its bandwidth at {readable(knee)}, by the fit"
    return Bucket(use, fit.op, fit.group, fit.ranks, size, shard, fit.knee_bytes is not None, reason)


def readable(bytes: float) -> str:
    """Bytes in binary units, as 4 KiB or 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(bytes) < 1024:
            return f"{bytes:.4g} {unit}"
        bytes /= 1024
    return f"{bytes:.4g} TiB"
