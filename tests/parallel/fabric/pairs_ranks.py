"""What the ranks of test_pairs.py do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from parallel.fabric.links import Matrix
from parallel.fabric.pairwise import pairwise, places
from parallel.processes import Processes


@contextlib.contextmanager
def slowed(on: bool) -> Iterator[None]:
    """Stops this process for four fifths of the time, however long it came to run in between."""
    if not on:
        yield
        return
    target = os.getpid()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.close(theirs)
        went_on = time.monotonic()
        while not select.select([ours], [], [], 0.001)[0]:  # until the pipe closes; the last signal is one to go on
            os.kill(target, signal.SIGSTOP)
            time.sleep(4 * (time.monotonic() - went_on))
            went_on = time.monotonic()
            os.kill(target, signal.SIGCONT)
        os._exit(0)
    os.close(ours)
    try:
        yield
    finally:
        os.close(theirs)
        os.waitpid(child, 0)


def measure(rank: int, world: int, slow: int | None, sizes: list[int], stop_after: int | None) -> Any:
    """(matrix, complete) of pairs; rank `slow` is slowed. stop_after: rank 1 wants to stop after so many questions."""
    processes = Processes(rank, world, rank, torch.device("cpu"))
    where = places(processes)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and rank == 1 and asked > stop_after

    with slowed(rank == slow):
        return pairwise(processes, sizes, where=where, apart=True, seconds=0.1, tolerance=2.0, stop=stop)


def arranged(rank: int, world: int, node_size: int | None) -> Any:
    return places(Processes(rank, world, rank, torch.device("cpu")), node_size)


def together(rank: int, world: int) -> Matrix:
    processes = Processes(rank, world, rank, torch.device("cpu"))
    return pairwise(processes, [8, 1 << 12], where=places(processes, 1), apart=False, seconds=0.01, tolerance=1000.0)[0]
