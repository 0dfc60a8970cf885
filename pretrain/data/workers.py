"""Processes that read steps ahead for a loader, and are replaced when they die.

Which batches a step has is settled before anybody reads them (see Stream), so who reads them, in which order and how
often changes nothing: a step whose worker was killed is simply read again by the next one.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from pretrain.data.batch import Batch
from pretrain.data.errors import DataError

AHEAD = 2  # steps that each worker is given in advance
DEATHS = 5  # in a row, without a step in between, after which the loader gives up
_END = 5.0  # seconds for a worker to leave by itself

Read = Callable[[dict[str, Any], int], list[Batch]]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    steps: list[int] = field(default_factory=list)
    """Asked for and not answered yet, in order."""


class Workers:
    """make: called in each worker to get what reads a step there, by the state that the loader is in.

    make must be picklable. Workers are started afresh (spawned), so that they share nothing with a process that uses a
    GPU; they ignore the signals that a job is stopped with, and leave when this process does.
    """

    def __init__(self, make: Callable[[], Read], count: int) -> None:
        assert count > 0
        self._make, self._context = make, multiprocessing.get_context("spawn")
        self._state: dict[str, Any] = {}
        self._found: dict[int, list[Batch] | DataError] = {}
        self._deaths = 0
        self._workers = [self._start() for _ in range(count)]

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._make, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here when the process dies
        return _Worker(process, ours)

    def read(self, step: int, state: dict[str, Any]) -> list[Batch]:
        """The batches of a step, by a loader's state; the steps after it are read meanwhile.

        Raises DataError as the loader would, and RuntimeError when workers die again and again.
        """
        if state != self._state:
            self._forget(state)
        count = len(self._workers)
        for ahead in range(step, step + AHEAD * count):
            worker = self._workers[ahead % count]
            if ahead not in self._found and ahead not in worker.steps:
                self._ask(ahead % count, ahead)
        while step not in self._found:
            self._receive()
        for passed in [number for number in self._found if number < step]:
            del self._found[passed]
        found = self._found.pop(step)
        if isinstance(found, DataError):
            raise found
        return found

    def _ask(self, index: int, step: int) -> None:
        self._workers[index].steps.append(step)
        try:
            self._workers[index].pipe.send((step, self._state))
        except OSError:  # it is dead
            self._replace(index)

    def _receive(self) -> None:
        """Waits for any worker to say something, or to die."""
        ready = wait([worker.pipe for worker in self._workers if worker.steps])
        for index, worker in enumerate(self._workers):
            if worker.pipe not in ready:
                continue
            try:
                step, found = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(index)
                continue
            worker.steps.remove(step)
            self._deaths = 0
            self._found[step] = DataError(found) if isinstance(found, str) else [_batch(each) for each in found]

    def _replace(self, index: int) -> None:
        """Starts another worker in the place of a dead one and asks it for the same steps."""
        dead = self._workers[index]
        dead.process.join()
        dead.pipe.close()
        self._deaths += 1
        how = f"data worker {dead.process.pid} died (exit code {dead.process.exitcode})"
        if self._deaths >= DEATHS:
            raise RuntimeError(
                f"{how}, {self._deaths} in a row; look for what kills them (memory?), or set data.workers=0"
            )
        print(f"{how}; another one reads steps {dead.steps}", file=sys.stderr, flush=True)
        self._workers[index] = self._start()
        for step in dead.steps:
            self._ask(index, step)

    def _forget(self, state: dict[str, Any]) -> None:
        # What was asked for under another state is read to its end and thrown away.
        while any(worker.steps for worker in self._workers):
            self._receive()
        self._found.clear()
        self._state = state

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.pipe.close()  # which they take as the end
        for worker in self._workers:
            worker.process.join(_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _batch(parts: tuple[Any, Any, Any, int, int]) -> Batch:
    tokens, targets, cu_seqlens, padding, damaged = parts
    rows = torch.from_numpy(tokens), torch.from_numpy(targets)
    return Batch(*rows, cu_seqlens=torch.from_numpy(cu_seqlens), padding=padding, damaged=damaged)


def _work(make: Callable[[], Read], pipe: Connection) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a job's last steps still want data
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
    read = make()
    try:
        while True:
            step, state = pipe.recv()
            try:
                batches = read(state, step)
            except DataError as error:
                pipe.send((step, str(error)))
                continue
            # As arrays, which are copied through the pipe: a tensor would be a file in shared memory that outlives a kill.
            pipe.send(
                (
                    step,
                    [
                        (b.tokens.numpy(), b.targets.numpy(), b.cu_seqlens.numpy(), b.padding, b.damaged)
                        for b in batches
                    ],
                )
            )
    except (EOFError, OSError):
        return
