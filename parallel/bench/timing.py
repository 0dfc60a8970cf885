"""The clock of a measurement, and how many iterations it takes.

Iterations run back to back, as in nccl-tests. Every rank notes when each of its iterations ended, counted from its own
start, and the iteration is over when the last rank has ended it: the maximum over ranks. Its time is the distance to
the one before. (Maxima of the ranks' own durations would count a wait twice: a rank that leaves early waits in the next
iteration, whose time it then lengthens.) With `isolated` a barrier precedes each iteration, and its time is the maximum
over ranks of their durations.

Between batches of iterations, and only there, the ranks talk: they take the maxima, and agree whether somebody was told
to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.bench.interrupt import Interrupted, Stop
from parallel.bench.summary import increments, relative_error
from parallel.processes import Processes

BATCH_US = 250_000.0  # a batch takes about this long, so that Ctrl-C need not wait longer
Call = Callable[[], object]
Clock = Callable[[int], list[float]]
"""iterations -> microseconds: their ends counted from the start, or their durations where isolated."""


@dataclass(frozen=True)
class Plan:
    """How often. iterations: a fixed number, or None: until the mean's 95% confidence interval is within `confidence`
    of it.
    """

    warmup: int = 5
    iterations: int | None = None
    confidence: float = 0.02
    least: int = 20
    most: int = 2000
    seconds: float = 2.0
    isolated: bool = False


class Control:
    """What all ranks decide together, between measurements."""

    def __init__(self, processes: Processes, stop: Stop):
        self.processes = processes
        self.stop = stop

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Elementwise maxima over all ranks, of one number of values on all. Raises Interrupted on all ranks if one was
        told to stop.
        """
        together = self._reduced([*values, float(self.stop.number)], dist.ReduceOp.MAX)
        if together[-1]:
            raise Interrupted(int(together[-1]))
        return together[:-1]

    def minimum(self, value: float) -> float:
        return -self.maxima([-value])[0]

    def _reduced(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.processes.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.processes.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def host_clock(call: Call, isolated: bool = False, meet: Call | None = None) -> Clock:
    """For calls that return when they are done. meet: a barrier."""
    now = time.perf_counter_ns

    def ends(iterations: int) -> list[float]:
        stamps = [0] * iterations
        start = now()
        for i in range(iterations):
            call()
            stamps[i] = now()
        return [(stamp - start) / 1000 for stamp in stamps]

    def durations(iterations: int) -> list[float]:
        assert meet is not None
        times = []
        for _ in range(iterations):
            meet()
            start = now()
            call()
            times.append((now() - start) / 1000)
        return times

    return durations if isolated else ends


def idle_clock(isolated: bool = False, meet: Call | None = None) -> Clock:
    """For ranks that only wait for others."""

    def ends(iterations: int) -> list[float]:
        for _ in range(iterations if isolated else 0):
            assert meet is not None
            meet()
        return [0.0] * iterations

    return ends


def measure(clock: Clock, control: Control, plan: Plan) -> list[float]:
    """Microseconds of each timed iteration, the same on all ranks. Collective over the job. Raises Interrupted."""
    estimate = control.maxima(clock(1))[0]  # the first call may connect ranks, compile, allocate
    # As many as asked for, but no more than fill a second: what large messages warm up is done by the first.
    more = min(plan.warmup - 1, int(1e6 / max(estimate, 1.0)))
    if more > 0:
        ends = control.maxima(clock(more))
        estimate = sum(ends) / more if plan.isolated else ends[-1] / more
    times: list[float] = []
    while batch := _batch(times, estimate, plan):
        # Ranks start apart, and their first iteration holds the wait for the last to start: it brings them into step, and does
        # not count. Among iterations so long that one makes a batch, the wait is nothing.
        first = 0 if plan.isolated or batch == 1 else 1
        taken = control.maxima(clock(first + batch))
        times += taken if plan.isolated else increments(taken)[first:]
        estimate = max(sum(times) / len(times), 1e-3)
    return times


def _batch(times: Sequence[float], estimate: float, plan: Plan) -> int:
    """How many iterations to run next, 0 for none. A function of what all ranks know, so that all decide alike."""
    done, elapsed = len(times), sum(times)
    if plan.iterations is not None:
        left = plan.iterations - done
    else:
        if done >= plan.most or (done >= min(3, plan.most) and elapsed >= plan.seconds * 1e6):
            return 0
        if done >= plan.least:
            error = relative_error(times)
            if error is not None and error <= plan.confidence:
                return 0
        affordable = int((plan.seconds * 1e6 - elapsed) / max(estimate, 1e-3))
        left = min(max(plan.least - done, done), plan.most - done, max(affordable, 1))
    return min(left, max(1, int(BATCH_US / max(estimate, 1e-3))))
