"""Timing several calls against each other in one process.

Interleaved, A B C A B C: load from elsewhere and clock changes then fall on all of them alike, and the ratio of two calls is
taken round by round. On a GPU the last-level cache is overwritten before each call, as other layers would do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHORTEST = 0.02  # seconds in one sample on a CPU
FLUSH_BYTES = 256 << 20  # larger than the L2 cache, or MI300's 256 MB memory-side cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / 2 / self.median
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / self.median

    def ratio(self, other: Timing) -> float:
        """How many times longer this takes than `other`: the median over rounds of the ratio in a round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.samples, other.samples))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    budget: float,
    least: int = 3,
    warmups: int = 1,
) -> dict[str, Timing]:
    """Times each call once a round.

    rounds: how many. budget: seconds after which no further round begins, once `least` rounds are done.
    warmups: untimed calls of each, for compilation, caches and allocators.
    """
    for _ in range(warmups):
        for call in calls.values():
            call()
    gpu = device.type == "cuda"
    repeats = {} if gpu else {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > budget:
            break
        took = _on_gpu(calls, device) if gpu else _on_cpu(calls, repeats)
        for name, seconds in took.items():
            samples[name].append(seconds)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _repeats(call: Callable[[], object]) -> int:
    """How often to make a call in one sample: a sample of less than SHORTEST is noise of the scheduler."""
    began = time.perf_counter()
    call()
    return max(1, math.ceil(SHORTEST / max(time.perf_counter() - began, 1e-7)))


def _on_cpu(calls: Mapping[str, Callable[[], object]], repeats: Mapping[str, int]) -> dict[str, float]:
    seconds = {}
    for name, call in calls.items():
        began = time.perf_counter()
        for _ in range(repeats[name]):
            call()
        seconds[name] = (time.perf_counter() - began) / repeats[name]
    return seconds


def _on_gpu(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Device time between two events. One synchronisation a round: the queue stays filled, launches overlap."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    events = {}
    for name, call in calls.items():
        flush.zero_()
        events[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[name][0].record()
        call()
        events[name][1].record()
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(end) / 1000 for name, (start, end) in events.items()}
