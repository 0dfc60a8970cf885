"""Times one call.

GPU: between two events of the stream, so that the host does not count; the queue stays filled, so that launches do not count
either. Before each call the last-level cache is overwritten by what other layers would have left there: by reading, because
lines that were written would have to go back to memory while the call is timed.
CPU: wall clock over as many calls as make a sample long enough for the scheduler not to matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.benching.hardware.machine import cache_bytes
from kernels.benching.timing import Timing

SHORTEST = 0.01  # seconds in one sample on a CPU
WARM_UPS = 3  # calls before timing on a GPU; the first loads the kernel, and clocks need a moment


@dataclass
class Clock:
    """rounds: samples of a call. budget: seconds after which no further sample begins, once there are two."""

    device: torch.device
    rounds: int
    budget: float = 2.0
    flush: bool = True
    _other: Tensor | None = field(default=None, repr=False)

    def time(self, call: Callable[[], object], *, flush: bool | None = None) -> Timing:
        """Seconds of one call, one a round. flush: None for the clock's own choice; a CPU's caches are never flushed."""
        if self.device.type == "cuda":
            return Timing(self._on_gpu(call, self.flush if flush is None else flush))
        return Timing(self._on_cpu(call))

    def seconds(self, call: float) -> float:
        """A guess of how long timing takes for a call of `call` seconds, warm-up and all."""
        if self.device.type == "cuda":
            return (WARM_UPS + self.rounds) * (call + 2e-4)  # a flush takes about 200 us
        return 2 * call + min(self.rounds * max(call, SHORTEST), self.budget + 2 * call)

    def _on_cpu(self, call: Callable[[], object]) -> tuple[float, ...]:
        call()
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        repeats = max(1, math.ceil(SHORTEST / max(took, 1e-7)))
        samples = [took] if repeats == 1 else []
        while len(samples) < self.rounds:
            if len(samples) >= 2 and time.perf_counter() - began > self.budget:
                break
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            samples.append((time.perf_counter() - start) / repeats)
        return tuple(samples)

    def _on_gpu(self, call: Callable[[], object], flush: bool) -> tuple[float, ...]:
        other = self._flushing() if flush else None
        first = self._events(call, WARM_UPS, other)
        rounds = max(2, min(self.rounds, int(self.budget / max(first[-1], 1e-7))))
        return tuple(self._events(call, rounds, other))

    def _events(self, call: Callable[[], object], rounds: int, other: Tensor | None) -> list[float]:
        pairs = []
        for _ in range(rounds):
            if other is not None:
                other.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        # An event has a resolution of half a microsecond, so that a call that does nothing may take no time at all.
        return [max(start.elapsed_time(end) / 1000, 1e-7) for start, end in pairs]

    def _flushing(self) -> Tensor:
        if self._other is None:
            size = 2 * max(cache_bytes(self.device), 64 << 20)
            self._other = torch.zeros(size // 4, dtype=torch.int32, device=self.device)
        return self._other
