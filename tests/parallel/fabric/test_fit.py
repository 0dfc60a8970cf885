"""Latency, bandwidth and knee found again in curves that were made from them, under noise and with outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.fabric.fit import Fit, Row, advice, fit, readable
from parallel.fabric.topology import factor

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send_recv")


def curve(
    op: str,
    ranks: int,
    alpha: float,
    busbw: float,
    sizes: list[int],
    rng: np.random.Generator,
    noise: float,
    odd: float,
) -> list[Row]:
    """Times of alpha seconds + S * factor / busbw, with relative noise, some of them (a share `odd`) far too long."""
    rows = []
    for size in sizes:
        seconds = (alpha + size * factor(op, ranks) / busbw) * math.exp(noise * rng.standard_normal())
        if rng.random() < odd:
            seconds *= rng.uniform(1.5, 10)
        rows.append(Row(op, "world", ranks, size, seconds))
    return rows


def made(seed: int, noise: float, odd: float) -> tuple[Fit, float, float, int]:
    """(fit, alpha, busbw in bytes/s, knee on the grid) of a random fabric measured in octaves around its knee."""
    rng = np.random.default_rng(seed)
    op, ranks = OPS[seed % len(OPS)], int(rng.choice([2, 4, 8, 64, 1024]))
    ranks = 2 if op == "send_recv" else ranks
    alpha, busbw = 10 ** rng.uniform(-6, -3), 10 ** rng.uniform(8, 11.7)
    exact = 9 * alpha * busbw / factor(op, ranks)
    first = max(0, math.floor(math.log2(exact)) - int(rng.integers(8, 14)))
    sizes = [1 << k for k in range(first, math.floor(math.log2(exact)) + 1 + int(rng.integers(4, 8)))]
    (found,) = fit(curve(op, ranks, alpha, busbw, sizes, rng, noise, odd))
    return found, alpha, busbw, next(size for size in sizes if size >= exact)


@pytest.mark.parametrize(("noise", "odd"), [(0.0, 0.0), (0.02, 0.0), (0.05, 0.05), (0.10, 0.05)])
def test_knee_within_one_size_under_noise(noise: float, odd: float) -> None:
    for seed in range(100):
        found, _, _, knee = made(seed, noise, odd)
        assert found.knee_bytes is not None, (seed, found)
        off = abs(math.log2(found.knee_bytes / knee))
        assert off <= (0 if noise == 0 else 1), (seed, found, knee)


def test_error_bars_are_as_wide_as_the_errors() -> None:
    """Of normal errors 95 % lie within two standard errors; with few points somewhat fewer."""
    alphas, bandwidths = [], []
    for seed in range(200):
        found, alpha, busbw, _ = made(seed, 0.05, 0.05)
        assert found.alpha_error_us and found.busbw_error_gbs and found.busbw_gbs
        alphas.append((found.alpha_us - 1e6 * alpha) / found.alpha_error_us)
        bandwidths.append((found.busbw_gbs - 1e-9 * busbw) / found.busbw_error_gbs)
    for errors in (alphas, bandwidths):
        within = np.mean(np.abs(errors) <= 2)
        assert 0.88 <= within <= 0.99, within
        assert abs(np.mean(errors)) < 0.3


def test_exact_rows_are_met_exactly() -> None:
    rows = [Row("all_reduce", "dp", 4, 1 << k, 25e-6 + (1 << k) * 1.5 / 200e9) for k in range(10, 31)]
    (found,) = fit(rows)
    assert found.alpha_us == pytest.approx(25, rel=1e-6)
    assert found.busbw_gbs == pytest.approx(200, rel=1e-6)
    assert found.half_bytes == pytest.approx(25e-6 * 200e9 / 1.5, rel=1e-6)
    assert found.knee_bytes == 1 << 25  # 9 * 3.33 MB = 30 MB
    assert found.follows and not found.outliers
    assert found.seconds(1 << 20) == pytest.approx(25e-6 + (1 << 20) * 1.5 / 200e9, rel=1e-6)


def test_one_stray_row_has_no_weight_and_is_named() -> None:
    rng = np.random.default_rng(0)
    rows = curve("all_gather", 8, 20e-6, 100e9, [1 << k for k in range(10, 30)], rng, 0.02, 0.0)
    rows[-1] = rows[-1]._replace(seconds=5 * rows[-1].seconds)  # the largest, which least squares would follow
    (found,) = fit(rows)
    assert found.outliers == (1 << 29,)
    assert found.busbw_gbs == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("sizes", [3, 4])
def test_few_sizes_have_the_errors_of_least_squares(sizes: int) -> None:
    """Against numpy's fit with the same weights."""
    rng = np.random.default_rng(sizes)
    rows = curve("send_recv", 2, 10e-6, 1e9, [8, 1 << 12, 1 << 16, 1 << 20][-sizes:], rng, 0.05, 0.0)
    (found,) = fit(rows)
    x, y = np.array([row.bytes for row in rows], float), np.array([row.seconds for row in rows])
    (slope, alpha), covariance = np.polyfit(x, y, 1, w=1 / np.array([found.seconds(each) for each in x]), cov=True)
    assert found.alpha_us == pytest.approx(1e6 * alpha, rel=1e-3)
    assert found.busbw_gbs == pytest.approx(1e-9 / slope, rel=1e-3)
    assert found.alpha_error_us == pytest.approx(1e6 * math.sqrt(covariance[1, 1]), rel=0.01)
    assert found.busbw_error_gbs == pytest.approx(1e-9 * math.sqrt(covariance[0, 0]) / slope**2, rel=0.01)
    assert not found.outliers


def test_groups_apart_repeats_together() -> None:
    rows = [
        Row("all_reduce", name, ranks, 1 << k, 1e-5 * ranks + (1 << k) / 1e9)
        for name, ranks in (("a", 2), ("b", 4))
        for k in range(8, 28)
    ]
    rows += [
        row._replace(seconds=9 * row.seconds) for row in rows
    ] + rows  # the median of three is the one in the middle
    rows += [Row("all_reduce", "few", 2, 1024, 1e-5), Row("all_reduce", "few", 2, 2048, 1e-5)]
    rows += [Row("all_reduce", "alone", 1, 1 << k, 1e-5) for k in range(8, 28)]
    assert [(each.group, each.ranks, round(each.alpha_us, 3)) for each in fit(rows)] == [("a", 2, 20.0), ("b", 4, 40.0)]


def test_no_bandwidth_in_small_sizes() -> None:
    (found,) = fit([Row("all_reduce", "world", 2, 8 << k, 30e-6 + 1e-9 * (k % 2)) for k in range(6)])
    assert found.alpha_us == pytest.approx(30, rel=1e-3)
    assert found.knee_bytes is None
    advised = advice([found])
    assert advised.bucket_bytes is None or not advised.buckets[0].measured


def test_not_saturated_is_said() -> None:
    alpha, busbw = 100e-6, 100e9  # half at 10 MB * 2 / 3, knee at 60 MB
    rows = [Row("reduce_scatter", "dp", 4, 1 << k, alpha + (1 << k) * 0.75 / busbw) for k in range(10, 25)]
    (found,) = fit(rows)
    assert found.knee_bytes is None
    assert found.knee_estimate_bytes == pytest.approx(9 * alpha * busbw / 0.75, rel=1e-3)
    advised = advice([found])
    assert advised.bucket_bytes == 128 << 20
    assert not advised.buckets[0].measured
    assert "not saturated" in advised.notes[0]


def test_a_curve_that_is_no_line_is_read_off_its_rows() -> None:
    """Fast up to 64 KiB, then another protocol that needs half a millisecond, then a bandwidth that stays."""

    def seconds(size: int) -> float:
        return 20e-6 + size / 1e9 if size <= 1 << 16 else 500e-6 + size / 50e9

    rows = [Row("send_recv", "world", 2, 1 << k, seconds(1 << k)) for k in range(8, 31)]
    (found,) = fit(rows)
    speeds = {row.bytes: row.bytes / row.seconds for row in rows}
    knee = min(size for size, speed in speeds.items() if speed >= 0.9 * max(speeds.values()))
    assert not found.follows
    assert found.knee_bytes is not None
    assert abs(math.log2(found.knee_bytes / knee)) <= 1


def test_a_cache_that_ends_does_not_hide_the_knee() -> None:
    """Bandwidth that falls again at large sizes, as memory does beyond a cache."""
    rows = [
        Row("all_gather", "world", 4, 1 << k, (20e-6 + (1 << k) / 8e9) * (1.6 if k > 22 else 1.0))
        for k in range(10, 28)
    ]
    (found,) = fit(rows)
    assert found.knee_bytes is not None
    assert 1 << 19 <= found.knee_bytes <= 1 << 22  # 1.4 MB by the part before


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([Row("all_reduce", "world", 2, 1024, 0.0)], "should be positive"),
        ([Row("all_reduce", "world", 2, 1024, math.nan)], "should be positive"),
        ([Row("all_sum", "world", 2, 1024, 1.0)], "no collective is named 'all_sum'"),
    ],
)
def test_rows_that_cannot_be(rows: list[Row], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        fit(rows)
    with pytest.raises(ValueError, match=r"level = 1\.5"):
        fit([], level=1.5)


def fitted(op: str, group: str, ranks: int, alpha: float, busbw: float) -> Fit:
    (found,) = fit([Row(op, group, ranks, 1 << k, alpha + (1 << k) * factor(op, ranks) / busbw) for k in range(10, 34)])
    return found


def test_advice_takes_the_smallest_saturated_power_of_two() -> None:
    fits = [
        fitted("all_reduce", "dp", 8, 40e-6, 450e9),
        fitted("reduce_scatter", "dp", 8, 30e-6, 400e9),
        fitted("reduce_scatter", "tp", 2, 5e-6, 60e9),
        fitted("all_gather", "dp", 8, 10e-6, 400e9),
    ]
    advised = advice(fits)
    assert advised.bucket_bytes == 128 << 20  # 9 * 30 us * 400 GB/s / (7/8) = 123 MB
    assert advised.fusion_bytes == 64 << 20  # 41 MB
    assert [(each.use, each.op, each.bytes >> 20, each.shard_bytes >> 20) for each in advised.buckets] == [
        ("gradients", "reduce_scatter", 128, 16),
        ("gradients", "all_reduce", 128, 128),  # 93 MB
        ("parameters", "all_gather", 64, 8),
    ]
    assert advised.notes == ()
    assert advice(fits, "tp").bucket_bytes == 8 << 20  # 9 * 5 us * 60 GB/s * 2 = 5.4 MB
    assert advice(fits[:1]).bucket_bytes == 128 << 20


def test_advice_without_the_op_says_what_to_measure() -> None:
    advised = advice([fitted("all_gather", "dp", 8, 10e-6, 400e9)])
    assert advised.bucket_bytes is None
    assert "measure reduce_scatter" in advised.notes[0]


def test_readable() -> None:
    assert [readable(size) for size in (100, 4096, 3 << 19, 8 << 30)] == ["100 B", "4 KiB", "1.5 MiB", "8 GiB"]
