"""Timing on GPUs: its logic, on a device that is imitated, and, where there is one, on a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from parallel.bench import device, overlap
from parallel.bench.device import Launch, captured, event_clock


class Device:
    """Streams with clocks of their own, in microseconds; what is called takes its time on the stream that is current."""

    def __init__(self) -> None:
        self.current = self.default = Stream(self)
        self.capturing: list[float] | None = None

    def work(self, microseconds: float) -> None:
        if self.capturing is not None:
            self.capturing.append(microseconds)
        else:
            self.current.now += microseconds

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, device: Device):
        self.device = device
        self.now = 0.0

    def wait_stream(self, other: Stream) -> None:
        self.now = max(self.now, other.now)

    def wait_event(self, event: Any) -> None:
        self.now = max(self.now, event.at)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        at = 0.0

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = made.current.now

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1000  # milliseconds, as torch's

    class Graph:
        def __init__(self) -> None:
            self.kept: list[float] = []

        def replay(self) -> None:
            for microseconds in self.kept:
                made.work(microseconds)

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        made.capturing = graph.kept
        yield
        made.capturing = None

    for name, value in {
        "Event": Event,
        "Stream": lambda priority=0: Stream(made),
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": made.stream,
        "current_stream": lambda: made.current,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


@pytest.mark.parametrize("side", [False, True])
def test_events_stand_between_iterations(imitated: Device, side: bool) -> None:
    clock = event_clock(lambda: imitated.work(10), Stream(imitated) if side else None)
    assert clock(3) == pytest.approx([10, 20, 30])
    assert clock(2) == pytest.approx([10, 20])
    assert imitated.default.now == 50  # what follows waits for the side stream


def test_isolated_iterations_are_timed_after_a_barrier(imitated: Device) -> None:
    clock = event_clock(lambda: imitated.work(10), None, True, lambda: imitated.work(1000))
    assert clock(3) == pytest.approx([10, 10, 10])


def test_a_graph_holds_as_many_collectives_as_asked_for(imitated: Device) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        imitated.work(10)

    replay = captured(call, 5, Stream(imitated))
    assert len(calls) == 6  # one before the capture
    assert event_clock(replay, Stream(imitated))(2) == pytest.approx([50, 100])
    assert len(calls) == 6  # replays do not call


def test_a_graph_needs_a_stream_of_its_own(imitated: Device) -> None:
    assert Launch().side_stream() is None
    assert Launch("own").side_stream() is None
    assert Launch("side").side_stream() is not None
    assert Launch("current", graph=3).side_stream() is not None


def test_priority_is_set_before_the_job_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY", raising=False)
    Launch().prepare_environment()
    assert "TORCH_NCCL_HIGH_PRIORITY" not in device.os.environ
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "")  # so that it is taken back
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")
    Launch(priority=True).prepare_environment()
    assert device.os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY")


def test_collectives_and_products_are_enqueued_in_the_order_of_their_times(imitated: Device) -> None:
    order = []

    def call() -> None:
        order.append("c")
        imitated.work(30)

    def product() -> None:
        order.append("p")
        imitated.work(10)

    collectives, products = overlap._on_gpu(call, product, 4, 30, 10)
    assert "".join(order) == "cpppcpppcpppc"
    assert collectives == pytest.approx([30, 60, 90, 120])
    assert products == pytest.approx([10 * i for i in range(1, 10)])
    assert overlap.inside(collectives, products) == pytest.approx(30)
    assert overlap.inside(products, collectives) == pytest.approx(10)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "extra", [(), ("--stream", "own"), ("--stream", "side"), ("--cuda-graph", "5"), ("--overlap", "512")]
)
def test_one_gpu(extra: tuple[str, ...], tmp_path: Any) -> None:
    import json

    from tests.ranks import launch

    file = tmp_path / "a.json"
    done = launch(
        ["-m", "parallel.bench", "all", "--sizes", "4K,1M", "--iterations", "5", *extra, "--json", file], nproc=None
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert rows and all(not row["wrong"] for row in rows)
    assert {row["backend"] for row in rows} <= {"nccl", "rccl"}
