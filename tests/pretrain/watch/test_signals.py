"""SIGTERM and SIGUSR1 at any moment of a job: exit code 75, a save if there is something to save, old checkpoints untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pretrain.watch import process
from pretrain.watch.watcher import GRACE
from tests.pretrain.train.small_run import losses, records
from tests.pretrain.watch.plan import At
from tests.pretrain.watch.watched import WAIT, Jobs, arguments, until

LONG = ("train.steps=100000", "checkpoint.every=100000")


@pytest.fixture(scope="module")
def trained(start: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with checkpoints of steps 2 and 4, of 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    job = start(1, arguments(folder, corpus, "train.steps=4", "checkpoint.every=2"))
    assert job.codes() == [0], job.text()
    return folder


def checkpoints(run: Path) -> dict[str, bytes]:
    """Every file below the checkpoints of a run, which come last in a listing of names."""
    return {
        str(path.relative_to(run)): path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()
    }


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


PHASES = ["start", "rendezvous", "data", "model", "load", "step"]


@pytest.mark.parametrize(("phase", "group"), [*((phase, False) for phase in PHASES), ("start", True), ("load", True)])
def test_with_nothing_to_save_a_signal_ends_the_job_at_once(
    phase: str, group: bool, trained: Path, corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    """In the phase "step" it is the first one of this process, which may compile for long; nothing is lost by it."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = checkpoints(run)
    job = start(1, arguments(run, corpus, "train.steps=8"), [At(phase, do="sleep")])
    job.reached(phase)
    job.signal(signal.SIGUSR1 if group else signal.SIGTERM, group=group)
    assert job.codes() == [75], job.text()
    assert checkpoints(run) == before and steps(run) == [2, 4]


@pytest.mark.parametrize("phase", ["start", "data"])
def test_with_nothing_to_save_a_signal_leaves_also_without_the_watcher(
    phase: str, corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    job = start(1, arguments(tmp_path, corpus), [At(phase, do="sleep")])
    job.reached(phase)
    os.kill(job.child(0), signal.SIGTERM)
    assert job.codes() == [75], job.text()


def test_a_rank_that_waits_for_another_one_to_start_leaves_at_once(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """It sits in a C function that no Python handler interrupts."""
    job = start(2, arguments(tmp_path, corpus), [At("rendezvous", do="nothing")], ranks=[0])
    job.reached("rendezvous")
    time.sleep(0.5)
    job.signal(signal.SIGTERM)
    assert job.codes() == [75]
    assert "stopped by SIGTERM in phase rendezvous, before there was anything to save" in job.said(0, "stderr")


def test_c_code_that_keeps_pythons_lock_does_not_delay_it(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    job = start(1, arguments(tmp_path, corpus), [At("step", 1, do="gil")])
    job.reached("step", 1)
    job.signal(signal.SIGTERM)
    assert job.codes() == [75]


@pytest.mark.parametrize(
    ("ranks", "group", "number"),
    [((1,), False, signal.SIGTERM), ((), False, signal.SIGUSR1), ((), True, signal.SIGTERM)],
    ids=["one rank", "all ranks", "all processes"],
)
def test_in_a_step_all_ranks_save_once_and_the_run_goes_on(
    ranks: tuple[int, ...], group: bool, number: int, corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    job = start(2, arguments(tmp_path, corpus, *LONG), [At("step", 3)], repeat=WAIT)
    job.reached("step", 3)
    for _ in range(2):  # and soon again: schedulers do, by another way
        job.signal(number, *ranks, group=group)
        job.heard(number, *ranks)
    time.sleep(GRACE + 0.3)  # a watcher in a hurry would have ended its rank by now
    job.release()
    assert job.codes() == [75, 75], job.text()
    assert f"stopped by {'a signal on another rank' if ranks else signal.Signals(number).name}" in job.said(0)
    (saved,) = steps(tmp_path)
    assert saved in (3, 4) and len(losses(tmp_path)) == saved
    again = start(2, arguments(tmp_path, corpus, *LONG, f"train.steps={saved + 1}"))
    assert again.codes() == [0, 0] and f"resumed after step {saved}" in again.said(0)
    assert len(losses(tmp_path)) == saved + 1


@pytest.mark.parametrize("background", ["true", "false"])
def test_during_a_save(background: str, corpus: Path, tmp_path: Path, start: Jobs) -> None:
    settings = ("train.steps=100000", "checkpoint.every=3", f"checkpoint.background={background}")
    job = start(2, arguments(tmp_path, corpus, *settings), [At("save", 3)])
    job.reached("save", 3)
    job.signal(signal.SIGTERM)
    job.heard(signal.SIGTERM)
    job.release()
    assert job.codes() == [75, 75], job.text()
    assert steps(tmp_path) == [3, 4]


def test_an_evaluation_is_cut_short_and_done_by_the_next_start(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    settings = ("train.steps=5", "checkpoint.every=100000", "validation.every=3", "validation.sequences=64")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = start(2, arguments(whole, corpus, *settings))
    other = start(2, arguments(cut, corpus, *settings), [At("evaluation", 3, count=1)])
    other.reached("evaluation", 3)
    other.signal(signal.SIGTERM, 1)
    other.heard(signal.SIGTERM, 1)
    other.release()  # the 64 sequences are 16 batches of each rank: the other one hears of it in one of the next four
    assert other.codes() == [75, 75], other.text()
    assert steps(cut) == [3] and not (cut / "validation.jsonl").exists()
    again = start(2, arguments(cut, corpus, *settings))
    assert job.codes() == again.codes() == [0, 0], again.text()
    assert records(cut, "validation.jsonl") == records(whole, "validation.jsonl")
    assert [record["step"] for record in records(cut, "validation.jsonl")] == [3, 5]
    assert losses(cut) == losses(whole)


def test_the_last_validation_is_left_too_and_done_by_the_next_start(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    settings = ("train.steps=3", "checkpoint.every=100000")
    job = start(2, arguments(tmp_path, corpus, *settings), [At("evaluation", 3, count=1)])
    job.reached("evaluation", 3)
    before = checkpoints(tmp_path)
    assert steps(tmp_path) == [3]
    job.signal(signal.SIGTERM)
    job.heard(signal.SIGTERM)
    job.release()
    assert job.codes() == [75, 75], job.text()
    assert not (tmp_path / "validation.jsonl").exists() and checkpoints(tmp_path) == before
    again = start(2, arguments(tmp_path, corpus, *settings))
    assert again.codes() == [0, 0], again.text()
    assert [record["step"] for record in records(tmp_path, "validation.jsonl")] == [3]
    assert "finished 3 steps" in again.said(0) and checkpoints(tmp_path) == before


@pytest.mark.parametrize("phase", ["step", "save", "evaluation"])
def test_a_second_signal_leaves_at_once(phase: str, corpus: Path, tmp_path: Path, start: Jobs) -> None:
    settings = ("train.steps=100000", "checkpoint.every=3", "validation.every=3")
    plan = [At(phase, 3, do="sleep")]
    job = start(1, arguments(tmp_path, corpus, *settings), plan, repeat=0.3)
    job.reached(phase, 3)
    job.signal(signal.SIGTERM)
    job.heard(signal.SIGTERM)
    time.sleep(0.6)
    job.signal(signal.SIGUSR1)
    assert job.codes() == [75], job.text()
    assert not (tmp_path / "checkpoints").exists() or steps(tmp_path) == []
    assert "stopped by SIGTERM" in job.said(0, "stderr") and "without waiting for a save" in job.said(0, "stderr")


@pytest.mark.parametrize(("step", "code"), [(2, 75), (3, 1)])
def test_an_error_after_a_signal(step: int, code: int, corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """In the second step the others may have had nothing to save and left at once, which this rank then meets as an error. Later
    they have not: then an error is an error."""
    job = start(1, arguments(tmp_path, corpus, *LONG), [At("step", step, do="fail")])
    job.reached("step", step)
    job.signal(signal.SIGTERM)
    job.heard(signal.SIGTERM)
    job.release()
    assert job.codes() == [code], job.text()
    assert "an error made by a test" in job.said(0, "stderr")


def test_a_signal_together_with_the_end_is_heard(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """The watcher stands still while the others leave at the signal, which this rank meets as an error in its second step."""
    job = start(1, arguments(tmp_path, corpus, *LONG), [At("step", 2, do="fail")])
    job.reached("step", 2)
    child = job.child(0)
    os.kill(job.pids[0], signal.SIGSTOP)
    job.signal(signal.SIGTERM)
    job.release()
    until(lambda: process.state(child) == "ended", job.text)
    os.kill(job.pids[0], signal.SIGCONT)
    assert job.codes() == [75], job.text()


def test_signals_end_where_training_has_ended(trained: Path, corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """A run that is done stays done: the whole validation is behind it, the curve is drawn, then comes a signal."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    job = start(1, arguments(run, corpus, "train.steps=5"), [At("end", 5, count=1)])
    job.reached("end", 5)
    job.signal(signal.SIGTERM)
    job.heard(signal.SIGTERM)
    job.release()
    assert job.codes() == [0], job.text()
    assert json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["step"] == 5
