"""A disk slower than the interval between saves: training waits for it, one save at a time, with one copy of the state."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

from pretrain.checkpoint import points
from pretrain.checkpoint.snapshot import Snapshots
from pretrain.train.callback import Callback, Run
from tests.faults.kills import quiet
from tests.pretrain.train.small_run import configuration, train
from tests.ranks import TRAINING, run_ranks


class Memory(Callback):
    """What is held for copies of the state, after every step."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.snapshots: list[Snapshots] = []
        before = Snapshots.__init__
        me = self

        def noted(self: Snapshots) -> None:
            before(self)
            me.snapshots.append(self)

        Snapshots.__init__ = noted  # type: ignore[method-assign]

    def on_step(self, run: Run) -> None:
        self.held.append(sum(tensor.nbytes for each in self.snapshots for tensor in each._memory.values()))


def slow(rank: int, world: int, run: Path, corpus: Path) -> list[int]:
    """Every save beside training takes until the next one has waited for it for 1.2 s."""
    quiet(run)
    memory, waited_for, join = Memory(), threading.Event(), threading.Thread.join

    def joined(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "checkpoint":
            waited_for.set()
        join(self, timeout)

    def observe(point: str) -> None:
        if point == "reserved" and threading.current_thread().name == "checkpoint":
            waited_for.wait()
            waited_for.clear()
            time.sleep(1.2)

    threading.Thread.join = joined  # type: ignore[method-assign]
    points.observer = observe
    assert train(configuration(run, corpus, "train.steps=6", "checkpoint.every=1", "checkpoint.keep=10"), [memory]) == 0
    return memory.held


def test_saves_wait_for_each_other_and_memory_does_not_grow(corpus: Path, tmp_path: Path) -> None:
    (held,) = run_ranks(slow, 1, tmp_path, corpus, preload=TRAINING)
    assert len(held) == 6 and held[0] == 0 and held[1] > 0
    assert set(held[1:]) == {held[1]}  # one copy from the first save to the last
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))] == [
        f"step_{step:08d}" for step in range(1, 7)
    ]
    said = (tmp_path / "printed.txt").read_text()
    waits = re.findall(r"step (\d): waited (\d+\.\d) s for the save before this one; saves are too frequent", said)
    assert [step for step, _ in waits] == ["2", "3", "4", "5", "6"]
