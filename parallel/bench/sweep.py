"""The measurement: every group shape, op, dtype, place and size in turn, all ranks in step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.bench import pattern
from parallel.bench.device import Launch, captured, event_clock
from parallel.bench.groups import Team
from parallel.bench.operations import REDUCED, Case, Operation, Piece, Work
from parallel.bench.rows import Row, bandwidths
from parallel.bench.sizes import show
from parallel.bench.summary import summarize
from parallel.bench.timing import Clock, Control, Plan, host_clock, idle_clock, measure

DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}
KEPT = 0.8  # share of the free memory that buffers may take


@dataclass(frozen=True)
class Task:
    """What to measure on one team. sizes: bytes asked for; what a row has is the nearest below that its shards divide."""

    team: Team
    operation: Operation
    dtype: str
    places: tuple[bool, ...]
    sizes: tuple[int, ...]
    redop: str = "sum"
    root: int = 0
    imbalance: float = 4.0


@dataclass
class Bench:
    """The tools of a run.

    backend: its name in the rows. ranks_here: ranks that share this machine's memory. check: compare answers, before the timed
    calls and after them. notes: what was left out. faults: wrong answers, in words. Both are the same on all ranks.
    """

    control: Control
    plan: Plan
    launch: Launch
    backend: str
    ranks_here: int = 1
    check: bool = True
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _pool: list[Tensor] = field(default_factory=lambda: [torch.empty(0, dtype=torch.uint8)] * 2)

    @property
    def device(self) -> torch.device:
        return self.control.processes.device

    def rows(self, task: Task) -> Iterator[Row]:
        """One row for each size and place. Collective over the job; ranks whose team does not work take part in the talk only."""
        done: set[int] = set()
        for size in task.sizes if task.operation.moves else (0,):
            case = self.case(task, size, task.places[0])
            if case.count in done:  # shards of at least one element: the smallest sizes may fall together
                continue
            done.add(case.count)
            for in_place in task.places:
                case = self.case(task, size, in_place)
                buffers = self.buffers(task, case)
                if buffers is None:
                    return
                yield self._row(task, case, task.operation.prepare(case, *buffers))

    def case(self, task: Task, size: int, in_place: bool) -> Case:
        operation = task.operation
        itemsize = DTYPES[task.dtype].itemsize
        count = operation.elements(size, task.team.size, itemsize) if operation.moves else 0
        own = self.launch.stream == "own" and self.device.type == "cuda"
        return Case(task.team, count, in_place, task.redop, task.root, task.imbalance, own)

    def buffers(self, task: Task, case: Case) -> tuple[Tensor, Tensor] | None:
        """(send, receive) for the case, or None, on all ranks, where they do not fit into the memory of one of them."""
        dtype = DTYPES[task.dtype]
        need = [count * dtype.itemsize for count in task.operation.need(case)]
        small = [i for i, pool in enumerate(self._pool) if need[i] > pool.numel()]
        if self.control.maxima([float(len(small))])[0]:
            growth = sum(need[i] - self._pool[i].numel() for i in small)
            room = self.control.minimum(self._free() - growth)
            if room < 0:
                self.notes.append(
                    f"{task.operation.name}, {task.team.shape.name}: {show(case.count * dtype.itemsize)} and beyond left out: "
                    f"buffers of {show(sum(need))} a rank do not fit (short of {show(-room)})"
                )
                return None
            for i in small:
                self._pool[i] = torch.empty(0, dtype=torch.uint8)  # first let go of the smaller one
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._pool[i] = torch.empty(need[i], dtype=torch.uint8, device=self.device)
        send, receive = (pool[:bytes].view(dtype) for pool, bytes in zip(self._pool, need))
        return send, receive

    def _free(self) -> float:
        """Bytes that this rank may still take."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return KEPT * (torch.cuda.mem_get_info(self.device)[0] + cached)
        return KEPT * psutil.virtual_memory().available / self.ranks_here

    def clock(self, task: Task, work: Work) -> Clock:
        team, isolated = task.team, self.plan.isolated
        meet = self.meet if isolated else None
        if not team.works:
            return idle_clock(isolated, meet)
        if not self._on_device(task):
            return host_clock(work.call, isolated, meet)
        stream = self.launch.side_stream()
        if self.launch.graph:
            assert stream is not None
            return event_clock(captured(work.call, self.launch.graph, stream), stream, isolated, meet)
        return event_clock(work.call, stream, isolated, meet)

    def share(self, task: Task) -> float:
        """How much of an iteration of the clock one message is. The same on all ranks."""
        graph = self.launch.graph if self._on_device(task) else 0
        return task.operation.share / max(1, graph)

    def _on_device(self, task: Task) -> bool:
        return self.device.type == "cuda" and task.operation.moves  # a barrier holds up the host, on GPUs too

    def meet(self) -> None:
        """All ranks of the job, also those that only wait."""
        if self.control.processes.world > 1:
            dist.barrier()

    def _row(self, task: Task, case: Case, work: Work) -> Row:
        for piece in work.inputs:  # also without a check: memory that was never written is not there yet
            pattern.fill(piece.tensor, self._table(task, piece.source, 0), piece.offset)
        checks = self.check and task.operation.moves
        wrong = self._wrong(task, case, work, 0) if checks else None
        share = self.share(task)
        taken = [time * share for time in measure(self.clock(task, work), self.control, self.plan)]
        if wrong is not None:
            wrong += self._wrong(task, case, work, 1)
        return self._filled(task, case, taken, wrong)

    def _filled(self, task: Task, case: Case, taken: list[float], wrong: int | None) -> Row:
        operation, ranks = task.operation, task.team.size
        size = case.count * DTYPES[task.dtype].itemsize
        summary = summarize(taken)
        algbw, busbw = bandwidths(operation.definition or operation.name, ranks, size, summary.microseconds)
        return Row(
            op=operation.name,
            group=task.team.shape.name,
            ranks=ranks,
            bytes=size,
            count=case.count // ranks if operation.shards else case.count,
            dtype=task.dtype,
            in_place=case.in_place,
            algbw=algbw,
            busbw=busbw,
            wrong=wrong,
            backend=self.backend,
            redop=task.redop if operation.reduces else None,
            root=task.root if operation.rooted else None,
            iterations=len(taken),
            **summary._asdict(),
        )

    def _wrong(self, task: Task, case: Case, work: Work, turn: int) -> int:
        """Runs the collective on fresh data and counts wrong elements over all ranks."""
        mine = 0
        if task.team.works:
            for output in work.outputs:
                output.tensor.fill_(pattern.NEVER)
            for piece in work.inputs:  # after the outputs, which in place are the same memory
                pattern.fill(piece.tensor, self._table(task, piece.source, turn), piece.offset)
        self.control.maxima([])  # nobody begins before all buffers are filled
        if task.team.works:
            work.call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            mine = sum(self._count(task, output, turn) for output in work.outputs)
        processes = self.control.processes
        by_rank = [0.0] * processes.world
        by_rank[processes.rank] = float(mine)
        by_rank = self.control.maxima(by_rank)
        total = int(sum(by_rank))
        if total:
            ranks = [rank for rank, count in enumerate(by_rank) if count]
            size = show(case.count * DTYPES[task.dtype].itemsize)
            self.faults.append(
                f"{task.operation.name} over {task.team.shape.name}, {size} {task.dtype}, "
                f"{'in' if case.in_place else 'out of'} place: {total} wrong elements, on rank(s) {', '.join(map(str, ranks))}"
            )
        return total

    def _count(self, task: Task, output: Piece, turn: int) -> int:
        ranks, tolerance = task.team.size, 0.0
        if task.redop == "avg" and output.source == REDUCED:  # libraries scale before or after the sum, as they like
            tolerance = (ranks + 2) * torch.finfo(DTYPES[task.dtype]).eps
        return pattern.wrong(output.tensor, self._table(task, output.source, turn), output.offset, tolerance)

    def _table(self, task: Task, source: int, turn: int) -> Tensor:
        # Only what is reduced has to keep its values small.
        redop = task.redop if task.operation.reduces else "max"
        if source == REDUCED:
            return pattern.answer(task.team.size, redop, turn)
        return pattern.table(source, task.team.size, redop, turn)
