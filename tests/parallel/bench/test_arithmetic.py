"""Sizes, statistics, splits, bandwidths: what can be checked with numbers alone."""

from __future__ import annotations

import math
import random

import pytest

from parallel.bench import summary
from parallel.bench.operations import OPERATIONS, chosen, splits
from parallel.bench.options import DTYPES as NAMES
from parallel.bench.rows import bandwidths
from parallel.bench.sizes import parse_size, parse_sizes, show, span
from parallel.bench.sweep import DTYPES


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("1.5M", 1572864),
        ("8G", 8 << 30),
        ("1T", 1 << 40),
    ],
)
def test_size(text: str, bytes: int) -> None:
    assert parse_size(text) == bytes


@pytest.mark.parametrize("text", ["", "K", "12X", "-4K", "0", "1K:2K", "0.3", "1e6", "4 0"])
def test_bad_size_names_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"4096, 64K, 1\.5M; --sizes takes one size, a range 1K:8G"):
        parse_size(text)


def test_sizes() -> None:
    assert parse_sizes("1K:8K") == [1024, 2048, 4096, 8192]
    assert parse_sizes("1K:9K", 3) == [1024, 3072, 9216]
    assert parse_sizes("64K,1K:4K,2K", 2) == [1024, 2048, 4096, 65536]
    assert len(parse_sizes("1K:8G")) == 24
    assert parse_sizes("1000:4000", 1.5) == [1000, 1500, 2250, 3375]


@pytest.mark.parametrize(
    ("text", "factor", "says"),
    [
        ("8K:1K", 2, "write the smaller size first: 1K:8K"),
        ("1K:8K:2K", 2, "2 colons"),
        ("1K:8K", 1, "--factor 1"),
        ("1K,,2K", 2, "'' is no"),
    ],
)
def test_bad_sizes(text: str, factor: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_sizes(text, factor)


def test_sizes_are_shown_as_they_are_read() -> None:
    for size in (1, 100, 1 << 10, 3 << 19, 1 << 33):
        assert parse_size(show(size).replace(" ", "")) == size
    assert span([4096, 1024]) == "1 KiB to 4 KiB"
    assert span([4096]) == "4 KiB"


def test_percentiles_are_nearest_rank() -> None:
    taken = summary.summarize([float(n) for n in range(100, 0, -1)])
    assert (taken.p50, taken.p95, taken.p99, taken.min, taken.max) == (50, 95, 99, 1, 100)
    assert taken.microseconds == 50.5
    assert summary.summarize([7.0]) == (7, 7, 7, 7, 7, 7, None)
    assert summary.summarize([1.0, 2.0]).p50 == 1
    assert summary.summarize([1.0, 2.0]).p99 == 2


def test_increments_add_up() -> None:
    assert summary.increments([3.0, 4.0, 9.0]) == [3, 1, 5]
    assert summary.increments([]) == []


def test_relative_error_is_the_confidence_interval_of_batch_means() -> None:
    assert summary.relative_error([1.0] * 19) is None
    assert summary.relative_error([1.0] * 20) == 0
    # Batch means 1..10 after pairs of (m, m): mean 5.5, deviation sqrt(55/6).
    times = [float(m) for m in range(1, 11) for _ in range(2)]
    expected = 2.262 * math.sqrt(55 / 6 / 10) / 5.5
    assert summary.relative_error(times) == pytest.approx(expected, rel=1e-12)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        times = [10 + draw.gauss(0, 1) for _ in range(50)]
        error = summary.relative_error(times)
        mean = sum(times) / len(times)
        assert error is not None
        held += abs(mean - 10) <= error * mean
    assert 930 <= held <= 970


@pytest.mark.parametrize(
    ("op", "ranks", "factor"),
    [
        ("all_reduce", 4, 1.5), ("all_reduce", 2, 1), ("reduce_scatter", 4, 0.75), ("all_gather", 8, 0.875),
        ("all_to_all", 4, 0.75), ("all_to_all_uneven", 4, 0.75), ("broadcast", 8, 1), ("reduce", 8, 1),
        ("send_recv", 8, 1), ("send_recv_pairs", 2, 1),
    ],
)  # fmt: skip
def test_bandwidths_are_those_of_nccl_tests(op: str, ranks: int, factor: float) -> None:
    # 8 MB in 2 ms are 4 GB/s (1e9), whatever the op; busbw is what its definition makes of it
    definition = OPERATIONS[op].definition or op
    assert bandwidths(definition, ranks, 8_000_000, 2000.0) == (4.0, 4.0 * factor)


def test_one_rank_has_no_bus_and_a_barrier_no_bytes() -> None:
    assert bandwidths("all_reduce", 1, 1000, 1.0) == (1.0, None)
    assert bandwidths("broadcast", 1, 1000, 1.0) == (1.0, None)
    assert bandwidths("all_reduce", 4, 0, 1.0) == (None, None)


@pytest.mark.parametrize(
    ("count", "ranks", "imbalance"), [(1000, 4, 4), (7, 4, 4), (3, 8, 10), (1 << 20, 6, 1), (5, 1, 4)]
)
def test_splits_cover_everything(count: int, ranks: int, imbalance: float) -> None:
    parts = splits(count, ranks, imbalance)
    assert len(parts) == ranks
    assert sum(parts) == count
    assert min(parts) >= 0
    if count > 100 and imbalance > 1:
        assert parts == sorted(parts)
        assert max(parts) / min(parts) == pytest.approx(imbalance, rel=0.01)


def test_elements_are_a_multiple_of_the_shards() -> None:
    gather, reduce = OPERATIONS["all_gather"], OPERATIONS["all_reduce"]
    assert gather.elements(1024, 3, 4) == 255
    assert gather.elements(4, 8, 4) == 8  # at least one each
    assert reduce.elements(1024, 3, 4) == 256
    assert reduce.elements(1, 3, 4) == 1


def test_operations_by_name_alias_and_all() -> None:
    assert [op.name for op in chosen(["allreduce,all_reduce", "sendrecv", "all-to-all-v"])] == [
        "all_reduce",
        "send_recv",
        "all_to_all_uneven",
    ]
    assert [op.name for op in chosen(["all"])] == list(OPERATIONS)
    assert {
        "all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "all_to_all_uneven", "reduce", "send_recv",
        "send_recv_pairs", "barrier",
    } == set(OPERATIONS)  # fmt: skip
    with pytest.raises(ValueError, match="did you mean 'all_gather'\\? choose among all_reduce, "):
        chosen(["all_gahter"])
    with pytest.raises(ValueError, match="no operation 'xyzzy'; choose among"):
        chosen(["xyzzy"])


def test_dtypes_of_the_command_line_are_those_of_the_measurement() -> None:
    assert list(NAMES) == list(DTYPES)
