"""What the ranks of the bench's tests run."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.bench.__main__ import main
from parallel.bench.device import Launch
from parallel.bench.groups import Shape, teams
from parallel.bench.interrupt import Stop
from parallel.bench.operations import OPERATIONS
from parallel.bench.summary import increments
from parallel.bench.sweep import Bench, Task
from parallel.bench.timing import Clock, Control, Plan, host_clock
from parallel.processes import Processes, join

Answer = tuple[int, str, str]
"""(exit code, standard output, standard error) of one rank"""


def command(rank: int, world: int, *arguments: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    return code, out.getvalue(), err.getvalue()


def read(rank: int, world: int, path: str, *arguments: str) -> tuple[Answer, dict[str, Any]]:
    """The command with --json path, and rank 0's file."""
    answer = command(rank, world, *arguments, "--json", path)
    return answer, json.loads(Path(path).read_text()) if rank == 0 else {}


def with_fault(rank: int, world: int, fault: str, path: str, *arguments: str) -> tuple[Answer, dict[str, Any]]:
    """The command, while torch's collective is wrong on the last rank."""
    names = {"stale": "all_reduce", "shifted": "all_to_all_single", "one bit": "broadcast"}
    name = names[fault]
    real = getattr(dist, name)

    def wrong(*tensors: Any, **options: Any) -> Any:
        if fault == "stale" and "group" in options and rank == world - 1:
            before = tensors[0].clone()
            real(*tensors, **options)
            tensors[0][-3:] = before[-3:]  # the end of the buffer was not reduced
            return None
        work = real(*tensors, **options)
        if rank == world - 1 and fault == "shifted":
            tensors[0].copy_(tensors[0].roll(tensors[0].numel() // world))  # right parts, wrong order
        if rank == world - 1 and fault == "one bit":
            tensors[0][17] += 1
        return work

    setattr(dist, name, wrong)
    return read(rank, world, path, *arguments)


def without_collectives(rank: int, world: int, path: str, *arguments: str) -> tuple[Answer, dict[str, Any]]:
    """The command, while torch's collectives on the measured groups do nothing (on our own control they work)."""
    for name in (
        "all_reduce", "reduce", "broadcast", "all_to_all_single", "all_gather_single", "all_gather_into_tensor",
        "reduce_scatter_single", "reduce_scatter_tensor", "send", "recv",
    ):  # fmt: skip
        real = getattr(dist, name, None)
        if real is not None:
            setattr(
                dist, name, lambda *given, real=real, **options: None if "group" in options else real(*given, **options)
            )
    dist.batch_isend_irecv = lambda operations: []
    return read(rank, world, path, *arguments)


def told_to_stop(rank: int, world: int, path: str, *arguments: str) -> tuple[Answer, dict[str, Any]]:
    """The command, while only the last rank gets a SIGTERM, in its 30th collective."""
    real = dist.all_reduce
    calls = 0

    def counting(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += "group" in options
        if rank == world - 1 and calls == 30:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **options)

    dist.all_reduce = counting
    return read(rank, world, path, *arguments)


def slow_rank(rank: int, world: int, seconds: float) -> list[float]:
    """Microseconds of a barrier that rank 1 joins late: the mean of three, and what all took."""
    processes = join("cpu")
    (team,) = teams([Shape("world", world)], rank, world, False, processes.timeout)
    real = dist.barrier

    def late(*given: Any, **options: Any) -> Any:
        if rank == 1:
            time.sleep(seconds)
        return real(*given, **options)

    dist.barrier = late
    with Stop() as stop:
        bench = Bench(Control(processes, stop), Plan(warmup=1, iterations=3), Launch(), "gloo")
        began = time.perf_counter()
        (row,) = bench.rows(Task(team, OPERATIONS["barrier"], "fp32", (False,), ()))
    return [row.microseconds, (time.perf_counter() - began) * 1e6]


def slow_messages(rank: int, world: int, seconds: float) -> list[float]:
    """Times of a message there and back, each way of which takes so long."""
    processes = join("cpu")
    (team,) = teams([Shape("world", world)], rank, world, False, processes.timeout)
    real = dist.send

    def late(*given: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*given, **options)

    dist.send = late
    with Stop() as stop:
        bench = Bench(Control(processes, stop), Plan(warmup=1, iterations=5), Launch(), "gloo")
        (row,) = bench.rows(Task(team, OPERATIONS["send_recv_pairs"], "fp32", (False,), (64,)))
    return [row.min, row.microseconds]


def same_iterations(rank: int, world: int, size: int, count: int) -> dict[str, Any]:
    """Microseconds by which the bench's clock and a bare loop's differ, of the very same all_reduces on this rank; the mean of
    one; and what the clock adds to an iteration of nothing.
    """
    join("cpu")
    x = torch.ones(size // 4)
    around: list[float] = []

    def call() -> None:
        dist.all_reduce(x)
        around.append(time.perf_counter())

    host_clock(call)(3)
    dist.barrier()
    ends = host_clock(call)(count + 1)  # the first one brings ranks into step
    ours = increments(ends)[1:]
    bare = [1e6 * (end - start) for start, end in pairwise(around[-1 - count :])]
    nothing = host_clock(lambda: None)
    added = min(nothing(1000)[-1] / 1000 for _ in range(20))
    # The median: where the process is stopped between the two looks at the clock, one iteration differs, and the next.
    apart = statistics.median(abs(one - other) for one, other in zip(ours, bare, strict=True))
    return {"apart": apart, "bare": statistics.fmean(bare), "added": added}


def against_bare(rank: int, world: int, sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """For each size, microseconds of one all_reduce by the bench's clock and twice by a bare loop, in turn, for so many seconds.

    A turn is short, about 4 ms, and nothing comes between turns: the ranks stay in step, and what the machine does meets
    neighbours alike. The two bare ones differ by what the machine does, and by nothing else.
    """
    processes: Processes = join("cpu")
    (team,) = teams([Shape("world", world)], rank, world, False, processes.timeout)
    found = []
    with Stop() as stop:
        control = Control(processes, stop)
        bench = Bench(control, Plan(), Launch(), "gloo", check=False)
        for size in sizes:
            task = Task(team, OPERATIONS["all_reduce"], "fp32", (True,), (size,))
            case = bench.case(task, size, True)
            buffers = bench.buffers(task, case)
            assert buffers is not None
            work = task.operation.prepare(case, *buffers)
            clock, x = bench.clock(task, work), work.inputs[0].tensor.zero_()

            def ours(count: int, clock: Clock = clock) -> float:
                return clock(count)[-1]

            def bare(count: int, x: torch.Tensor = x) -> float:
                start = time.perf_counter_ns()
                for _ in range(count):
                    dist.all_reduce(x)
                return (time.perf_counter_ns() - start) / 1000

            estimate = control.maxima([min(bare(5) for _ in range(5)) / 5])[0]
            count = max(1, int(4e3 / estimate))
            turns = max(30, int(seconds * 1e6 / (3 * count * estimate)))
            loops = {"ours": ours, "bare": bare, "again": bare}
            times: dict[str, list[float]] = {name: [] for name in loops}
            bare(3)  # in step
            for turn in range(turns):
                for which in [*loops, *loops][turn % 3 :][:3]:
                    times[which].append(loops[which](count) / count)
            found.append(
                {"bytes": size, "iterations": count} | {name: control.maxima(all_) for name, all_ in times.items()}
            )
    return found
