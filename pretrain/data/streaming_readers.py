"""Who reads lanes: this process, or processes of its own that read ahead and are replaced when they die.

What a lane holds is settled by its position (see streaming_lane), so it can be read by anybody, and again.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

from pretrain.data.errors import DataError
from pretrain.data.streaming_lane import Lane, Position, Recipe, Window

DEATHS = 5  # of processes in a row, without a window in between, after which the reader gives up
WAITING = 128  # windows that one process is asked for at a time; their requests fit into a pipe
_END = 5.0  # seconds for a process to leave by itself

Key = tuple[int, int, int]
"""(run of stages, source, lane)"""
Recipes = dict[tuple[int, int], Recipe]
"""By run of stages and source."""


class Readers(Protocol):
    def read(self, key: Key, number: int, since: Position) -> Window:
        """Window `number` of a lane, which may be read from `since` on. Raises DataError."""
        ...

    def close(self) -> None: ...


class Here:
    """Reads in this process."""

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes
        self._lanes: dict[Key, Lane] = {}

    def read(self, key: Key, number: int, since: Position) -> Window:
        lane = self._lanes.get(key)
        if lane is None or not since.number <= lane.position.number <= number:
            lane = self._lanes[key] = Lane(self._recipes[key[:2]], key[2], since)
        try:
            while True:
                window = next(lane)
                if window.number == number:
                    return window
        except DataError:
            del self._lanes[key]
            raise

    def close(self) -> None:
        self._lanes.clear()


@dataclass
class _Process:
    process: BaseProcess
    pipe: Connection
    waiting: int = 0  # windows asked for and not answered


@dataclass
class _Ahead:
    """A lane that a process reads. tip: its position behind the newest window that came. asked: windows still to come."""

    process: int
    turn: int
    tip: Position
    asked: int = 0
    came: deque[Window | DataError] = field(default_factory=deque)


class Processes:
    """Reads in `count` processes of its own, `ahead` windows of each lane in advance.

    They are started afresh (spawned), so that they share nothing with a process that uses a GPU; they ignore the signals that a
    job is stopped with, and leave when this process does. `read` raises RuntimeError when they die again and again.
    """

    def __init__(self, recipes: Recipes, count: int, ahead: int) -> None:
        assert count > 0 and ahead > 0
        self._recipes, self._ahead = recipes, ahead
        self._context = multiprocessing.get_context("spawn")
        self._lanes: dict[Key, _Ahead] = {}
        self._deaths = self._turns = 0
        self._processes = [self._start() for _ in range(count)]

    @property
    def pids(self) -> list[int]:
        return [each.process.pid or 0 for each in self._processes]

    def _start(self) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._recipes, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen here when the process dies
        return _Process(process, ours)

    def read(self, key: Key, number: int, since: Position) -> Window:
        lane = self._lanes.get(key)
        if lane is None or not since.number <= lane.tip.number - len(lane.came) <= number:
            # The same process goes on with a lane; new ones go round.
            self._turns += 1
            process = lane.process if lane is not None else len(self._lanes) % len(self._processes)
            lane = self._lanes[key] = _Ahead(process, self._turns, since)
        while True:
            while lane.came:
                found = lane.came.popleft()
                if isinstance(found, DataError):
                    del self._lanes[key]
                    raise found
                if found.number == number:
                    self._ask(key, lane)
                    return found
            self._ask(key, lane)
            self._receive()

    def _ask(self, key: Key, lane: _Ahead) -> None:
        """Asks for what is missing to `ahead` windows, or for one at least, if the process has not been asked for too much."""
        process = self._processes[lane.process]
        while process.waiting >= WAITING and not lane.asked:
            self._receive()
            process = self._processes[lane.process]
        while lane.asked + len(lane.came) < self._ahead and process.waiting < WAITING:
            self._send(key, lane)
            if process is not self._processes[lane.process]:
                return  # it was replaced, and asked anew

    def _send(self, key: Key, lane: _Ahead) -> None:
        process = self._processes[lane.process]
        lane.asked, process.waiting = lane.asked + 1, process.waiting + 1
        try:
            # Only the first one needs to say where: the others follow.
            process.pipe.send((key, lane.turn, lane.tip if lane.asked == 1 else None))
        except OSError:  # it is dead
            self._replace(lane.process)

    def _receive(self) -> None:
        """Waits for any process to say something, or to die."""
        ready = wait([each.pipe for each in self._processes if each.waiting])
        for index, each in enumerate(self._processes):
            if each.pipe not in ready:
                continue
            try:
                key, turn, found = each.pipe.recv()
            except (EOFError, OSError):
                self._replace(index)
                continue
            each.waiting -= 1
            self._deaths = 0
            lane = self._lanes.get(key)
            if lane is None or lane.turn != turn:
                continue  # asked for before the lane was taken up from elsewhere
            lane.asked -= 1
            lane.came.append(DataError(found) if isinstance(found, str) else found)
            if isinstance(found, Window):
                lane.tip = found.after

    def _replace(self, index: int) -> None:
        """Starts another process in the place of a dead one and asks it for the same windows."""
        dead = self._processes[index].process
        dead.join()
        self._processes[index].pipe.close()
        self._deaths += 1
        how = f"data worker {dead.pid} died (exit code {dead.exitcode})"
        if self._deaths >= DEATHS:
            raise RuntimeError(
                f"{how}, {self._deaths} in a row; look for what kills them (memory?), or set data.workers=0"
            )
        lost = {key: lane.asked for key, lane in self._lanes.items() if lane.process == index}
        print(f"{how}; another one reads its {len(lost)} lanes", file=sys.stderr, flush=True)
        self._processes[index] = self._start()
        for key, asked in lost.items():
            self._lanes[key].asked = 0
            for _ in range(asked):
                self._send(key, self._lanes[key])

    def close(self) -> None:
        for each in self._processes:
            each.pipe.close()  # which they take as the end
        for each in self._processes:
            each.process.join(_END)
            if each.process.is_alive():
                each.process.kill()
                each.process.join()
        self._lanes.clear()


def _work(recipes: Recipes, pipe: Connection) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a job's last steps still want data
        signal.signal(each, signal.SIG_IGN)
    lanes: dict[Key, Lane | None] = {}
    try:
        while True:
            key, turn, since = pipe.recv()
            if since is not None:
                lane = lanes.get(key)
                if lane is None or lane.position != since:
                    lanes[key] = Lane(recipes[key[:2]], key[2], since)
            try:
                reader = lanes.get(key)
                # After an error nothing follows, however much was asked for.
                pipe.send((key, turn, next(reader) if reader is not None else "the lane ended with an error before"))
            except DataError as error:
                lanes[key] = None
                pipe.send((key, turn, str(error)))
    except (EOFError, OSError):
        return
