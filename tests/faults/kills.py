"""One trial: a run in which somebody is killed, started again, must end like a run that nobody touched.

Everything about a trial follows from its seed. The ranks are forked warm (tests/ranks.py), so a trial takes seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.checkpoint import points
from pretrain.checkpoint.folder import entries, leftovers
from pretrain.checkpoint.snapshot import Snapshots
from pretrain.train.callback import Callback, Run
from pretrain.train.metrics import read as read_metrics
from tests.pretrain.train.small_run import checkpoint_tensors, configuration, losses, train, train_on_rank
from tests.ranks import TRAINING, Died, RanksFailed, run_ranks

STEPS, EVERY = 8, 2
SETTINGS = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=2", "train.timeout=20")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "FSDP2": (2, ()),
    "replicas": (2, ("mesh.replicate=2",)),
    "ZeRO-2": (2, ("engine.kind=deepspeed", "engine.stage=2")),
    "pipeline": (2, ("mesh.pp=2",)),
    "tensor": (2, ("mesh.tp=2",)),
    "context": (2, ("mesh.cp=2",)),
}
LATE = ("manifest", "renamed", "published", "pruning")  # only the coordinator passes these
DIED_AT = "died_at"  # a file in the run folder: the clock just before the kill


@dataclass(frozen=True)
class Kill:
    """Who dies and when. moment: "step" (at its end), "time" (seconds), "staging" (the copy of the state to the host is half
    made) or a point of a save; count: which step, or the how-manieth time the moment comes, or seconds.
    """

    layout: str
    background: bool
    victims: tuple[int, ...]
    moment: str
    count: float

    def __str__(self) -> str:
        who = "all ranks" if len(self.victims) > 1 else f"rank {self.victims[0]}"
        return f"{self.layout}, {'background' if self.background else 'waiting'} saves, {who} at {self.moment} {self.count:.3g}"


@dataclass
class Outcome:
    """faults: what was wrong; none means passed. detection: seconds from the kill until the last survivor had left."""

    kill: Kill
    faults: list[str] = field(default_factory=list)
    happened: bool = False
    steps_lost: int = 0
    detection: float | None = None


def draw(generator: random.Random, layouts: list[str] | None = None) -> Kill:
    """A kill: half of them aimed at a moment of a save, the others at a step or at any time."""
    layout = generator.choice(layouts or list(LAYOUTS))
    world = LAYOUTS[layout][0]
    moment = generator.choice(
        [
            "step",
            "time",
            "time",
            "staging",
            "reserved",
            "writing",
            "written",
            "manifest",
            "renamed",
            "published",
            "pruning",
        ]
    )
    everybody = world > 1 and generator.random() < 0.3
    victim = 0 if moment in (*LATE, "reserved") else generator.randrange(world)
    victims = tuple(range(world)) if everybody else (victim,)
    count = {"step": generator.randint(1, STEPS - 1), "time": generator.uniform(0.0, 1.0)}.get(
        moment, generator.randint(1, STEPS // EVERY)
    )
    return Kill(layout, generator.random() < 0.5, victims, moment, count)


class Executioner(Callback):
    """Kills this process, if it is a victim, when the moment comes; the others die with it if all are victims."""

    def __init__(self, kill: Kill, rank: int, run: Path, seconds: float):
        self.kill, self.rank, self.run = kill, rank, run
        self.seen = 0
        if rank not in kill.victims:
            return
        if len(kill.victims) > 1 and rank != kill.victims[0]:
            threading.Thread(target=self._follow, daemon=True).start()
        elif kill.moment == "time":
            threading.Timer(kill.count * seconds, self.now).start()
        elif kill.moment == "staging":
            copy, half = Snapshots._copy, self

            def stop_half_way(self: Snapshots, *arguments: object) -> torch.Tensor:
                half.passed("staging", 7)
                return copy(self, *arguments)  # type: ignore[arg-type]

            Snapshots._copy = stop_half_way  # type: ignore[method-assign]
        elif kill.moment != "step":
            points.observer = self.passed

    def passed(self, point: str, times: int = 1) -> None:
        if point == self.kill.moment:
            self.seen += 1
            if self.seen >= self.kill.count * times:
                self.now()

    def on_step(self, run: Run) -> None:
        if self.kill.moment == "step" and self.rank == self.kill.victims[0] and run.step == self.kill.count:
            self.now()

    def now(self) -> None:
        (self.run / DIED_AT).write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def _follow(self) -> None:
        while not (self.run / DIED_AT).exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)


def killed_on_rank(
    rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], kill: Kill, seconds: float
) -> tuple[str, float]:
    """How this rank ended, if it did not die, and when."""
    quiet(run)
    try:
        outcome = str(train(configuration(run, corpus, *overrides), [Executioner(kill, rank, run, seconds)]))
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.monotonic()


def started_again(
    rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], stop: int | None = None
) -> int:
    quiet(run)
    return train_on_rank(rank, world, run, corpus, overrides, stop)


def quiet(run: Path) -> None:
    """What this process prints goes to a file beside the run: hundreds of runs would bury the table."""
    run.mkdir(parents=True, exist_ok=True)
    log = os.open(run / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


class Trials:
    """Runs trials against the same untouched runs, one for each layout, made when first needed."""

    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder, corpus
        self.untouched: dict[str, tuple[list[float], dict[str, torch.Tensor], float]] = {}
        self.number = 0

    def reference(self, layout: str) -> tuple[list[float], dict[str, torch.Tensor], float]:
        """(losses, tensors of the last checkpoint, seconds) of a run that nobody touched."""
        if layout not in self.untouched:
            world, overrides = LAYOUTS[layout]
            run = self.folder / f"untouched {layout}"
            start = time.monotonic()
            codes = run_ranks(started_again, world, run, self.corpus, SETTINGS + overrides, preload=TRAINING)
            assert codes == [0] * world
            last = run / f"checkpoints/step_{STEPS:08d}"
            self.untouched[layout] = losses(run), checkpoint_tensors(last), time.monotonic() - start
        return self.untouched[layout]

    def trial(self, kill: Kill) -> Outcome:
        outcome = Outcome(kill)
        world, overrides = LAYOUTS[kill.layout]
        overrides = (*SETTINGS, *overrides, f"checkpoint.background={str(kill.background).lower()}")
        expected, tensors, seconds = self.reference(kill.layout)
        self.number += 1
        run = self.folder / f"trial {self.number}"
        try:
            results = run_ranks(
                killed_on_rank,
                world,
                run,
                self.corpus,
                overrides,
                kill,
                seconds,
                may_die=kill.victims,
                preload=TRAINING,
            )
        except RanksFailed as error:
            outcome.faults.append(f"the survivors did not leave: {str(error).splitlines()[0]}")
            return outcome
        outcome.happened = any(isinstance(result, Died) for result in results)
        survivors = [result for result in results if not isinstance(result, Died)]
        if outcome.happened and survivors:
            outcome.detection = max(left for _, left in survivors) - float((run / DIED_AT).read_text())
            outcome.faults += [f"a survivor ended with {text}" for text, _ in survivors if text == "75"]
        metrics = run / "metrics.jsonl"
        done = max((record["step"] for record in read_metrics(metrics)), default=0) if metrics.exists() else 0
        committed = [entry.step for entry in entries(run / "checkpoints") if not entry.fault]
        outcome.steps_lost = done - max(committed, default=0)
        # A save in the background may still be under way when the one before the next is due, never longer.
        if outcome.steps_lost > 2 * EVERY:
            outcome.faults.append(f"{outcome.steps_lost} steps lost")
        if any(entry.fault for entry in entries(run / "checkpoints")):
            outcome.faults.append("a checkpoint without its files has a name")
        try:
            codes = run_ranks(started_again, world, run, self.corpus, overrides, preload=TRAINING)
        except RanksFailed as error:
            outcome.faults.append(f"the next start failed: {str(error).splitlines()[-1]}")
            return outcome
        if codes != [0] * world:
            outcome.faults.append(f"the next start ended with {codes}")
        if losses(run) != expected:
            outcome.faults.append("losses differ from the untouched run's")
        found = checkpoint_tensors(run / f"checkpoints/step_{STEPS:08d}")
        if different := [name for name in tensors if name not in found or not torch.equal(found[name], tensors[name])]:
            outcome.faults.append(f"tensors differ: {', '.join(different[:3])} and {len(different[3:])} more")
        if left := [path.name for path in leftovers(run / "checkpoints")]:
            outcome.faults.append(f"left behind: {', '.join(left)}")
        if not outcome.faults:
            shutil.rmtree(run)
        return outcome
