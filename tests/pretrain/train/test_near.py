"""Runs whose processes are killed go on from near memory, and end as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.processes import Processes
from pretrain.checkpoint import points
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.near import room
from pretrain.checkpoint.near.config import NearConfig
from pretrain.checkpoint.near.tier import Tier
from pretrain.train import near as train_near
from pretrain.train.callback import Callback, Run
from tests.pretrain.train.small_run import checkpoint_tensors, configuration, losses, train, train_on_rank
from tests.ranks import TRAINING, Died, run_ranks

SETTINGS = ("checkpoint.every=100", "checkpoint.background=false", "train.steps=6")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "FSDP2": (),
    "ZeRO-2": ("engine.kind=deepspeed", "engine.stage=2", "checkpoint.every=3"),
    "experts": ("mesh.ep=2",),
    "tensor": ("mesh.tp=2",),
    "pipeline": ("mesh.pp=2", "mesh.pp_schedule=zbv", "mesh.pp_layers=[0, 1, 1, 0]"),
    "ZeRO-3": ("engine.kind=deepspeed", "engine.stage=3"),
}
LONG = ("experts", "tensor", "pipeline", "ZeRO-3")


class Die(Callback):
    """kill -9 at the end of step 5, when the near save of step 4 is complete."""

    def __init__(self) -> None:
        self.complete = threading.Semaphore(0)
        points.observer = lambda point: self.complete.release() if point == "near: pruned" else None

    def on_step(self, run: Run) -> None:
        if run.step in (3, 5):
            assert self.complete.acquire(timeout=60)
        if run.step == 5:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def near_run(
    rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], die: bool = False, full: bool = False
) -> int:
    """Every rank on a host of its own. What the run prints goes to the file `printed` beside it."""
    log = os.open(run.with_name("printed"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    folder = run.with_name(f"{run.name}-host{rank}")
    folder.mkdir(exist_ok=True)
    near = f"checkpoint.near={{folder: {folder}, every: 2}}"
    if full:
        room.free_bytes = lambda folder: 1000 * (1 + rank)
    return train(configuration(run, corpus, *SETTINGS, near, *overrides), [Die()] if die else [])


def hosts(run: Path) -> list[Path]:
    return [run.with_name(f"{run.name}-host{rank}") for rank in range(2)]


def equal_ends(a: Path, b: Path) -> bool:
    ends = [checkpoint_tensors(run / "checkpoints/step_00000006") for run in (a, b)]
    return ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with FSDP2, without near saves."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(train_on_rank, 2, run, corpus, SETTINGS, preload=TRAINING) == [0, 0]
    return run


def killed(run: Path, corpus: Path, *overrides: str) -> None:
    assert run_ranks(near_run, 2, run, corpus, overrides, True, may_die=[0, 1], preload=TRAINING) == [
        Died(-9),
        Died(-9),
    ]
    assert not list((run / "checkpoints").glob("step_0000000[456]"))


def resumed(world: int, run: Path, corpus: Path, *overrides: str, full: bool = False) -> str:
    """Goes on to the end; what it printed. Nothing may be left in near memory."""
    printed = run.with_name("printed")
    printed.unlink()
    assert run_ranks(near_run, world, run, corpus, overrides, False, full, preload=TRAINING) == [0] * world
    assert len(losses(run)) == 6
    assert [list(folder.iterdir()) for folder in hosts(run)[:world]] == [[]] * world
    assert not (run / "checkpoints/near.json").exists()
    return printed.read_text()


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.campaign if name in LONG else []) for name in LAYOUTS]
)
def test_killed_and_resumed_from_near_memory_equals_uninterrupted(
    layout: str, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    overrides, run = LAYOUTS[layout], tmp_path / "run"
    if overrides:
        whole = tmp_path / "whole"
        assert run_ranks(train_on_rank, 2, whole, corpus, (*SETTINGS, *overrides), preload=TRAINING) == [0, 0]
    killed(run, corpus, *overrides)
    saved = (run / "checkpoints/step_00000003").exists()
    if not saved:
        (run / "checkpoints/step_00000003").mkdir()  # a damaged checkpoint, and there is no other
    shutil.rmtree(hosts(run)[0 if layout == "FSDP2" else 1])  # one node is lost with its processes
    out = resumed(2, run, corpus, *overrides)
    why = "newer than the checkpoint of step 3" if saved else "there is no checkpoint"
    assert saved == ("checkpoint.every=3" in overrides) and out.count(f"resuming step 4 from near memory, {why}\n") == 1
    assert "resumed after step 4\n" in out
    assert losses(run) == losses(whole) and equal_ends(run, whole)


def test_what_near_memory_cannot_give_the_checkpoint_gives(whole: Path, corpus: Path, tmp_path: Path) -> None:
    run, every = tmp_path / "job/run", "checkpoint.every=3"
    run.parent.mkdir()
    killed(run, corpus, every)
    shutil.copytree(run.parent, tmp_path / "copy")

    out = resumed(1, run, corpus, every)  # on another number of ranks
    line = "it was made by dp 2 = 2 rank(s) on cpu, torch engine, and this job is dp 1 = 1 rank(s) on cpu, torch engine"
    assert f"step 4 in near memory cannot be used: {line}\n" in out and "resumed after step 3\n" in out

    shutil.rmtree(run.parent)
    (tmp_path / "copy").rename(run.parent)
    for folder in hosts(run):
        for path in folder.rglob("00001.data"):
            path.unlink()
    out = resumed(2, run, corpus, every, full=True)  # with both copies of a part lost, and no room for new ones
    assert out.count("step 4 in near memory cannot be used: ") == 1 and "00001.data: No such file" in out
    assert "resumed after step 3\n" in out
    assert out.count("no more saves in near memory: step 4 takes ") == 1 and "and 1000 are left" in out
    assert losses(run) == losses(whole) and equal_ends(run, whole)


class OneRank:
    """The callback in a loop that is a few lines long: one tensor, one process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "near").mkdir()
        self.lines: list[str] = []
        self.gate = threading.Event()
        self.checkpoints = Checkpoints(folder / "run/checkpoints")
        self.tier = Tier(NearConfig(folder=folder / "near", every=2), self.checkpoints.folder, "one")
        progress: Any = SimpleNamespace(say=self.lines.append)
        loader: Any = None
        self.near = train_near.Near(self.tier, self.checkpoints, loader, progress)
        self.w = torch.arange(4.0)
        engine = SimpleNamespace(state_tensors=lambda: {"model/w": self.w})
        processes = Processes(0, 1, 0, torch.device("cpu"))
        self.run: Any = SimpleNamespace(step=0, last=False, engine=engine, processes=processes)
        monkeypatch.setattr(train_near, "content", lambda run, loader: {"step": run.step})
        monkeypatch.setattr(points, "observer", lambda point: point == "near: before own" and self.gate.wait(30))
        self.near.on_start(self.run)

    def step(self, number: int) -> None:
        self.run.step = number
        self.w += 100
        self.near.on_step(self.run)

    def wait(self) -> None:
        assert self.near.thread is not None
        self.near.thread.wait()

    def back(self) -> tuple[int, list[float]] | None:
        w = torch.zeros(4)
        tensors, own = {"model/w": w}, {"rng_cpu": torch.get_rng_state()}
        found = self.tier.resume(tensors, own, self.checkpoints.list(), lambda meta: None)
        return None if found is None else (found.step, w.tolist())


def test_training_does_not_wait_and_a_save_holds_the_moment_it_was_begun_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = OneRank(tmp_path, monkeypatch)
    for number in (1, 2, 3, 4, 5, 6):  # the save of step 2 is under way all the time
        job.step(number)
    job.gate.set()
    job.wait()
    assert job.back() == (2, [200, 201, 202, 203])
    assert (job.near.saved, job.near.rounds, job.tier.skipped) == (1, 3, 2)
    assert [line for line in job.lines if "under way" in line] == [
        "step 4: not kept in near memory, the save before it is under way; later ones are only counted"
    ]
    for number in (7, 8):
        job.step(number)
    job.wait()
    assert job.back() == (8, [800, 801, 802, 803])
    job.near.close()


def test_what_happened_before_a_rewind_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = OneRank(tmp_path, monkeypatch)
    job.gate.set()
    job.step(2)
    job.run.step = 1
    job.near.on_rewind(job.run)
    assert job.back() is None
    job.step(2)
    job.wait()
    assert job.back() == (2, [200, 201, 202, 203])
    job.near.close()


def test_near_saves_go_when_the_last_step_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = OneRank(tmp_path, monkeypatch)
    job.gate.set()
    job.step(2)
    job.checkpoints.save(1, {"model/w": job.w}, {})
    job.near.on_end(job.run)  # as after a start with no step left to make: what near memory has, is nowhere else
    assert [entry.step for entry in job.checkpoints.list()] == [2, 1]
    assert list((tmp_path / "near").iterdir()) == [] and "near memory: 1 of 1 saves" in job.lines[-2]
    assert not (job.checkpoints.folder / "near.json").exists()
    job.near.on_end(job.run)
    assert len(job.checkpoints.list()) == 2
    job.near.close()


def test_ranks_that_can_no_longer_speak_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = OneRank(tmp_path, monkeypatch)
    job.gate.set()

    def fail(*_: Any) -> bool:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(job.tier, "save", fail)
    job.step(2)
    job.wait()
    for number in (4, 6):
        job.step(number)
    assert [line for line in job.lines if "connection" in line] == [
        "no more saves in near memory: connection closed by peer; training goes on"
    ]
    job.near.on_rewind(job.run)
    assert not (job.checkpoints.folder / "near.json").exists()  # so that the next job takes nothing from before
    job.near.on_end(job.run)
    job.near.close()


def test_without_memory_for_a_copy_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = OneRank(tmp_path, monkeypatch)
    job.gate.set()
    job.step(2)
    job.wait()

    def fail(tensors: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace")

    monkeypatch.setattr(job.near.snapshots, "take", fail)
    for number in (4, 6):
        job.step(number)
        job.wait()
    (line,) = [line for line in job.lines if "no more" in line]
    assert (
        "step 4, rank 0: no memory for a copy of the state (RuntimeError: DefaultCPUAllocator: can't allocate memory);"
        in line
    )
    job.tier.off = ""
    assert job.back() == (2, [100, 101, 102, 103])
    job.near.close()
