"""The clock, with a time that is made up; on a GPU, the order of what is put into the queue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels.benching.hardware import clock
from kernels.benching.hardware.clock import Clock

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    value = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: value[0])
    return value


def _taking(now: list[float], seconds: float, calls: list[int]):
    def call() -> None:
        calls[0] += 1
        now[0] += seconds

    return call


def test_short_calls_are_repeated_until_a_sample_is_long_enough(now: list[float]) -> None:
    calls = [0]
    timing = Clock(CPU, rounds=3).time(_taking(now, 0.004, calls))
    assert calls[0] == 2 + 3 * 3  # a warm-up, a guess of the length, three samples of 12 ms
    assert timing.samples == pytest.approx((0.004,) * 3)


def test_long_calls_are_made_as_often_as_the_budget_allows(now: list[float]) -> None:
    calls = [0]
    timing = Clock(CPU, rounds=10, budget=2.0).time(_taking(now, 1.5, calls))
    assert timing.samples == (1.5, 1.5)  # the guess counts as a sample; two at least
    assert calls[0] == 3


def test_on_a_gpu_caches_are_overwritten_before_each_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("wait"))
    device = torch.device("cuda")
    timed = Clock(device, rounds=4)
    timed._other = SimpleNamespace(sum=lambda: queue.append("flush"))  # type: ignore[assignment]
    timing = timed.time(lambda: queue.append("call"))
    assert timing.samples == (0.002,) * 4
    once = ["flush", "event", "call", "event"]
    assert queue == once * clock.WARM_UPS + ["wait"] + once * 4 + ["wait"]
    queue.clear()
    assert len(timed.time(lambda: queue.append("call"), flush=False).samples) == 4
    assert "flush" not in queue
    assert len(Clock(device, rounds=4, budget=0.003, flush=False).time(lambda: None).samples) == 2


def test_how_long_timing_will_take(now: list[float]) -> None:
    timed = Clock(CPU, rounds=5, budget=2.0)
    for seconds, wanted in ((0.001, 2 * 0.001 + 5 * 0.01), (0.1, 0.7), (3.0, 6.0 + 2.0 + 6.0)):
        assert timed.seconds(seconds) == pytest.approx(wanted)
