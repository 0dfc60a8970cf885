"""Measures every link between two ranks, and every rank alone, for links.py to judge. Collective over the job.

A message goes from one rank to the other and a small one comes back; half of a small message's journey there and back is the
latency, and what a large message takes more than that is its own. So both directions of a link are seen apart without clocks that
agree. NCCL and RCCL run their operations one after the other, so nothing is posted ahead there; on gloo the reply is awaited
beforehand, or each message would first ask whether it may come.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fabric.links import Matrix, Place, rounds
from parallel.processes import Processes

LEAST, MOST = 3, 300  # timed messages of one size in one direction
AGAIN = 2  # times that what looks slow is measured again, ...
RECHECK = 64  # ... in so many pairs at most
WORK = {"cpu": (torch.float32, 256, 80), "cuda": (torch.bfloat16, 4096, 20)}  # a product: dtype, size, how often


def places(processes: Processes, node_size: int | None = None) -> list[Place]:
    """Every rank's place. node_size: ranks of a node, where it is not as the launcher says. ValueError if it does not divide."""
    if node_size is not None and (node_size < 1 or processes.world % node_size):
        raise ValueError(f"nodes of {node_size} ranks do not divide {processes.world} ranks")
    own = (socket.gethostname(), os.environ.get("GROUP_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", processes.world)))
    everyone: list[Any] = [own] * processes.world
    if processes.world > 1:
        dist.all_gather_object(everyone, own)
    found: list[Place] = []
    nodes: dict[Any, int] = {}
    members: dict[int, int] = {}
    for rank, (host, group_rank, local_world) in enumerate(everyone):
        key: Any = (host, rank // local_world if group_rank is None else group_rank)
        node = rank // node_size if node_size is not None else nodes.setdefault(key, len(nodes))
        local = members.get(node, 0)
        members[node] = local + 1
        found.append(Place(rank, host, node, local))
    return found


def pairwise(
    processes: Processes,
    sizes: Sequence[int],
    *,
    where: Sequence[Place],
    apart: bool,
    seconds: float = 0.2,
    tolerance: float = 1.25,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> tuple[Matrix, bool]:
    """Times of messages of `sizes` bytes (ascending, the first small) between all pairs, and of a piece of work on each rank.

    apart: one pair at a time; otherwise each rank talks to one other at a time, and all at once. seconds: per pair, about.
    tolerance: see Matrix.findings. What looks slow is measured twice more, alone, and everything where times scatter; the
    shortest times count, for noise only adds. stop: asked between rounds; if it says True on any rank all end together. Returns
    the matrix, complete on every rank, and whether it was measured to the end. where: what `places` gave.
    """
    matrix = Matrix.empty(sizes, where)
    meeting = _Meeting(processes, matrix, seconds, stop)
    schedule = rounds(processes.world)
    if apart:
        schedule = [[pair] for pairs in schedule for pair in pairs]
    for again in range(1 + AGAIN):
        findings = matrix.findings(tolerance) if again else []
        if again and not matrix.scatters(tolerance):  # only what looks slow, each pair alone
            suspects = matrix.suspects(findings)
            schedule = [[pair] for pair in suspects[:: max(1, -(-len(suspects) // RECHECK))]]
        computes = not again or any(each.what == "compute" for each in findings)
        if computes and not _work(processes, matrix, apart, stop):
            return matrix, False
        for index, pairs in enumerate(schedule):
            progress(index, len(schedule))
            if not meeting.hold(pairs):
                return matrix, False
    return matrix, True


class _Meeting:
    """Rounds of pairs that talk, after each of which all ranks know all times."""

    def __init__(self, processes: Processes, matrix: Matrix, seconds: float, stop: Callable[[], bool]):
        self.processes, self.matrix, self.stop = processes, matrix, stop
        self.budget = seconds / (2 * len(matrix.sizes))
        device = processes.device
        self.buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for size in matrix.sizes]
        self.replies = torch.zeros(matrix.sizes[0], dtype=torch.uint8, device=device)

    def hold(self, pairs: Iterable[tuple[int, int]]) -> bool:
        """Measures pairs at the same time. False where somebody wants to stop."""
        rank = self.processes.rank
        times = [float("nan")] * len(self.buffers)
        partner = -1
        for one, other in pairs:
            if rank in (one, other):
                partner = other if rank == one else one
                if rank == one:
                    times = self.ask(other)
                    self.answer(other)
                else:
                    self.answer(one)
                    times = self.ask(one)
        own = torch.tensor([partner, self.stop(), *times], dtype=torch.float64, device=self.processes.device)
        everyone = [torch.empty_like(own) for _ in range(self.processes.world)]
        dist.all_gather(everyone, own)
        table = torch.stack(everyone).tolist()
        for sender, values in enumerate(table):
            if values[0] >= 0:
                partner, trips = int(values[0]), values[2:]
                latency = min(trips[0], table[partner][2]) / 2  # both have measured it
                # A message takes no less than the reply, so half is the least; where a reply was held up, the better guess.
                self.matrix.put(sender, partner, [latency, *(max(trip - latency, trip / 2) for trip in trips[1:])])
        return not any(values[1] for values in table)

    def ask(self, partner: int) -> list[float]:
        """Seconds to the partner and, with a small message, back, of each size."""
        found: list[float] = []
        for buffer in self.buffers:
            first = min(self.there_and_back(buffer, partner) for _ in range(2))  # the first of all connects the two
            count = max(LEAST, min(MOST, int(self.budget / first)))
            dist.send(torch.tensor([count], device=buffer.device), partner)
            # The first one asks whether it may come, the others were asked for before. The mean: a process that stops and goes
            # on slows one message in a hundred, and that one by a thousand.
            found.append(statistics.fmean([self.there_and_back(buffer, partner) for _ in range(1 + count)][1:]))
        return found

    def answer(self, partner: int) -> None:
        """The other end of `ask`."""
        for buffer in self.buffers:
            self.reply(buffer, partner, 2)
            count = torch.zeros(1, dtype=torch.int64, device=buffer.device)
            dist.recv(count, partner)
            self.reply(buffer, partner, 1 + int(count))

    def there_and_back(self, buffer: Tensor, partner: int) -> float:
        if buffer.is_cuda:
            torch.cuda.synchronize()
            start = time.perf_counter()
            _post(dist.isend, buffer, partner)
            _post(dist.irecv, self.replies, partner)
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.perf_counter()
        reply = dist.irecv(self.replies, partner)
        dist.send(buffer, partner)
        assert reply is not None
        reply.wait()
        return time.perf_counter() - start

    def reply(self, buffer: Tensor, partner: int, count: int) -> None:
        if buffer.is_cuda:
            for _ in range(count):
                _post(dist.irecv, buffer, partner)
                _post(dist.isend, self.replies, partner)
                torch.cuda.synchronize()
            return
        coming = dist.irecv(buffer, partner)
        for left in reversed(range(count)):
            assert coming is not None
            coming.wait()
            if left:
                coming = dist.irecv(buffer, partner)
            dist.send(self.replies, partner)


def _post(operation: Callable[..., Any], tensor: Tensor, partner: int) -> None:
    # As a batch of one: single sends would form a communicator for every pair of ranks.
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, partner)]):
        work.wait()


def _work(processes: Processes, matrix: Matrix, apart: bool, stop: Callable[[], bool]) -> bool:
    """The same products on every rank, one rank after the other where they share a host's processors."""
    own = float("nan")
    for turn in range(processes.world if apart else 1):
        if not apart or turn == processes.rank:
            own = _products(processes.device)
        if processes.world > 1:
            dist.barrier()
    told = torch.tensor([own, float(stop())], dtype=torch.float64, device=processes.device)
    everyone = [torch.empty_like(told) for _ in range(processes.world)]
    dist.all_gather(everyone, told)
    table = torch.stack(everyone).tolist()
    for rank, (seconds, _) in enumerate(table):
        matrix.compute[rank] = min(seconds, matrix.compute[rank]) if matrix.compute[rank] > 0 else seconds
    return not any(row[1] for row in table)


def _products(device: torch.device) -> float:
    """Mean seconds of a matrix product, after a warm-up."""
    dtype, size, times = WORK[device.type]
    x = torch.full((size, size), 1e-3, device=device, dtype=dtype)
    took = []
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.fmean(took[times // 4 :])
