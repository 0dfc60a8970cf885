"""Memory bandwidth: bytes counted, sizes swept, answers checked, and what counts as memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kernels.benching.hardware import bandwidth, machine
from kernels.benching.hardware.bandwidth import Arrays, Stream, ceilings, default_sizes, measure, remark
from kernels.benching.hardware.clock import Clock
from kernels.benching.timing import Timing
from tests.kernels.benching.hardware_rows import stream

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(("op", "arrays"), [("copy", 2), ("mul", 2), ("add", 3), ("triad", 3), ("dot", 2)])
def test_bytes_are_counted_as_babelstream_counts_them(op: str, arrays: int) -> None:
    assert Stream(op, 10**9, Timing((0.5, 1.0, 2.0))).gbs == arrays  # the median, 1 s


def test_every_pattern_computes_what_its_name_says() -> None:
    arrays = Arrays(1000, CPU)
    a, b, c = (x.clone() for x in (arrays.a, arrays.b, arrays.c))
    assert len({float(x[0]) for x in (a, b, c)}) == 3
    calls = arrays.calls()
    assert set(calls) == set(bandwidth.ARRAYS)
    assert float(calls["dot"]()) == pytest.approx(sum(x * y for x, y in zip(a.tolist(), b.tolist())))  # type: ignore[arg-type]
    calls["copy"]()
    assert torch.equal(arrays.c, a)
    calls["mul"]()
    assert torch.allclose(arrays.b, 0.4 * a, rtol=1e-15)
    calls["add"]()
    assert torch.allclose(arrays.c, 1.4 * a, rtol=1e-15)
    calls["triad"]()
    assert torch.allclose(arrays.a, 0.4 * a + 0.4 * 1.4 * a, rtol=1e-15)


def test_right_answers_pass_and_one_element_off_is_found() -> None:
    arrays = Arrays(5000, CPU)
    for op, call in arrays.calls().items():
        assert arrays.wrong(op, call) == ""

    def but(op: str, target: torch.Tensor, last: float) -> str:
        def call() -> None:
            arrays.calls()[op]()
            target[-1] *= last

        return arrays.wrong(op, call)

    for op, target in (("copy", arrays.c), ("mul", arrays.b), ("add", arrays.c), ("triad", arrays.a)):
        assert but(op, target, 1 + 1e-13) == f"1 of 5000 elements of {op} are wrong"
    # What is never written is not excused by an answer of before that was right.
    arrays.calls()["copy"]()
    short = arrays.wrong("copy", lambda: arrays.c[:-3].copy_(arrays.a[:-3]))
    assert short == "3 of 5000 elements of copy are wrong"


def test_a_wrong_dot_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = Arrays(5000, CPU)
    dot = torch.dot
    monkeypatch.setattr(torch, "dot", lambda x, y: dot(x[1:], y[1:]))
    assert arrays.wrong("dot", arrays.calls()["dot"]).startswith("the dot product is off by ")


def test_the_figure_for_memory_is_that_of_arrays_past_the_caches() -> None:
    rows = [stream("copy", 20 * MIB, 900.0), stream("copy", 40 * MIB, 100.0), stream("copy", 64 * MIB, 110.0)]
    assert ceilings(rows, 10 * MIB) == {"copy": pytest.approx(110.0)}
    assert ceilings([*rows, stream("copy", 128 * MIB, 500.0, "1 of 2")], 10 * MIB) == {"copy": pytest.approx(110.0)}
    assert ceilings(rows[:2], 30 * MIB) == {"copy": pytest.approx(100.0)}  # none is past them: the largest
    assert ceilings([], 10 * MIB) == {}


def test_sizes_go_from_inside_the_caches_to_past_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 300 * MIB)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 64 << 30)
    sizes = default_sizes(CPU)
    assert sizes[0] == 1 << 16
    assert sizes[-1] == 2 << 30  # the power of two from 1200 MiB on
    assert all(b == 4 * a for a, b in pairwise(sizes[:-1]))
    assert default_sizes(CPU, quick=True) == [2 << 30]
    assert remark(sizes, 300 * MIB) == ""
    monkeypatch.setattr(machine, "free_bytes", lambda device: 4 << 30)
    assert max(default_sizes(CPU)) == 512 * MIB  # an eighth of what is free
    assert remark(default_sizes(CPU), 300 * MIB) == (
        "the largest array has 512 MiB, less than 4 times the cache of 300 MiB: some of it may have come from the cache"
    )


def test_all_patterns_are_measured_at_all_sizes() -> None:
    rows = list(measure([4096, 16384], Clock(CPU, 2, budget=0.0)))
    assert [(row.array_bytes, row.op) for row in rows] == [(n, op) for n in (4096, 16384) for op in bandwidth.ARRAYS]
    assert all(row.gbs > 0 and row.wrong == "" for row in rows)


def test_the_caches_size_is_read_from_the_system(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("48K", "2M", "32768K", "")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.cache_bytes(CPU) == 32 * MIB
    monkeypatch.setattr(machine, "CACHES", tmp_path / "nowhere")
    assert machine.cache_bytes(CPU) == machine.UNKNOWN_CACHE
