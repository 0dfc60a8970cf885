"""A collective beside a matrix product: how much each slows the other down.

Both are timed alone, then together: on a GPU the collectives run on a stream of their own, on a CPU in a thread of
their own, while products run one after the other. Only iterations that lie wholly inside the time when both were busy
count.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from parallel.bench.device import event_clock
from parallel.bench.rows import Row
from parallel.bench.sweep import DTYPES, Bench, Task
from parallel.bench.timing import Call, Plan, host_clock, idle_clock, measure

ALONE = 20  # products timed alone
ABOUT_US = 300_000.0  # how long the two run together,
FEWEST = 10  # or as long as this many of the slower one take


@dataclass(frozen=True)
class Beside:
    """One size. Times in microseconds, of the slowest rank: of one collective and one product, alone and beside each
    other.

    matmul: m, n, k of the product, in `matmul_dtype`. hidden: share of the shorter work that the other hides when both
    do the same time's worth: 1 where neither slows the other down, 0 where they might as well take turns. None where
    they never overlapped.
    """

    op: str
    group: str
    ranks: int
    bytes: int
    dtype: str
    in_place: bool
    backend: str
    matmul: tuple[int, int, int]
    matmul_dtype: str
    collective_alone: float
    collective_beside: float | None
    collective_slowdown: float | None
    matmul_alone: float
    matmul_beside: float | None
    matmul_slowdown: float | None
    hidden: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inside(stamps: Sequence[float], other: Sequence[float]) -> float | None:
    """Mean duration of the intervals between neighbouring `stamps` that lie wholly between the first and last of
    `other`.
    """
    if len(stamps) < 2 or len(other) < 2:
        return None
    first = bisect.bisect_left(stamps, other[0])
    last = bisect.bisect_right(stamps, other[-1]) - 1
    return (stamps[last] - stamps[first]) / (last - first) if last > first else None


def hidden(collective: float, matmul: float) -> float:
    """From the slowdowns of both: work that takes t alone on either side takes t * max together, and 2t one after the
    other.
    """
    return min(1.0, max(0.0, 2 - max(collective, matmul)))


class Product:
    """C = A B of size m x m. Its inputs are small, so that repeated products stay finite."""

    def __init__(self, side: int, dtype: str, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        a, b = (
            torch.randn(side, side, device=device, generator=generator).to(DTYPES[dtype]) / math.sqrt(side)
            for _ in "ab"
        )
        c = torch.empty_like(a)
        self.shape = (side, side, side)
        self.dtype = dtype
        self.call: Call = lambda: torch.mm(a, b, out=c)


def beside(bench: Bench, task: Task, product: Product) -> Iterator[tuple[Row, Beside]]:
    """For each size of the task the row of the collective alone, and the record. Collective over the job. Raises
    Interrupted.
    """
    for row in bench.rows(task):
        case = bench.case(task, row.bytes, row.in_place)
        buffers = bench.buffers(task, case)
        assert buffers is not None, "the row was measured with them"
        work = task.operation.prepare(case, *buffers)
        share = bench.share(task)
        collective, matmul = row.microseconds / share, _alone(bench, task, product)
        slices: tuple[float | None, float | None] = (None, None)
        if task.team.works:
            together = max(ABOUT_US, FEWEST * collective, FEWEST * matmul)
            run = _on_gpu if bench.device.type == "cuda" else _on_cpu
            collectives, products = run(work.call, product.call, math.ceil(together / collective), collective, matmul)
            slices = inside(collectives, products), inside(products, collectives)
        slow = [slow or None for slow in bench.control.maxima([slice or 0.0 for slice in slices])]
        factors = [there / here if there else None for there, here in zip(slow, (collective, matmul))]
        yield (
            row,
            Beside(
                op=row.op,
                group=row.group,
                ranks=row.ranks,
                bytes=row.bytes,
                dtype=row.dtype,
                in_place=row.in_place,
                backend=row.backend,
                matmul=product.shape,
                matmul_dtype=product.dtype,
                collective_alone=row.microseconds,
                collective_beside=slow[0] * share if slow[0] else None,
                collective_slowdown=factors[0],
                matmul_alone=matmul,
                matmul_beside=slow[1],
                matmul_slowdown=factors[1],
                hidden=hidden(factors[0], factors[1]) if factors[0] and factors[1] else None,
            ),
        )


def _alone(bench: Bench, task: Task, product: Product) -> float:
    """Microseconds of one product while all ranks that work run theirs."""
    if not task.team.works:
        clock = idle_clock()
    else:
        clock = event_clock(product.call, None) if bench.device.type == "cuda" else host_clock(product.call)
    times = measure(clock, bench.control, Plan(iterations=ALONE))
    return math.fsum(times) / len(times)


def _on_cpu(call: Call, product: Call, count: int, *_: float) -> tuple[list[float], list[float]]:
    """Stamps of `count` collectives in a thread, and of products meanwhile."""
    collectives: list[float] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            collectives.append(time.perf_counter() * 1e6)
            for _ in range(count):
                call()
                collectives.append(time.perf_counter() * 1e6)
        except BaseException as error:  # to be raised where somebody looks
            failure.append(error)

    thread = threading.Thread(target=run, name="collectives")
    products = [time.perf_counter() * 1e6]
    thread.start()
    while thread.is_alive():
        product()
        products.append(time.perf_counter() * 1e6)
    thread.join()
    if failure:
        raise failure[0]
    return collectives, products


def _on_gpu(call: Call, product: Call, count: int, collective: float, matmul: float) -> tuple[list[float], list[float]]:
    """Stamps of `count` collectives on a stream of their own, and of as much time's worth of products on the current
    one.
    """
    stream = torch.cuda.Stream()
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    stream.wait_event(origin)
    ends: tuple[list[torch.cuda.Event], list[torch.cuda.Event]] = ([], [])
    torch.cuda.synchronize()
    # Enqueued in the order in which they will run: one kind after the other, the first would be done before the second begins.
    while len(ends[0]) < count:
        ahead = len(ends[0]) * collective > len(ends[1]) * matmul
        event = torch.cuda.Event(enable_timing=True)
        if ahead:
            product()
            event.record()
        else:
            with torch.cuda.stream(stream):
                call()
                event.record()
        ends[ahead].append(event)
    torch.cuda.synchronize()
    first, second = ([origin.elapsed_time(event) * 1000 for event in kind] for kind in ends)
    return first, second
