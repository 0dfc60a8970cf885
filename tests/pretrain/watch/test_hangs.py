"""Hangs end: in time, with 76 on every rank, and with a report that names rank, phase and step. What is slow does not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.watch import process, report
from tests.pretrain.train.small_run import losses
from tests.pretrain.watch.plan import At
from tests.pretrain.watch.test_ends import accounts, torchrun
from tests.pretrain.watch.watched import Job, Jobs, arguments, until

LIMITS = ("watchdog.floor=6", "watchdog.factor=2", "watchdog.gather=30")
ABSENT = ("train.timeout=4", "watchdog.gather=0.5")
WHAT = ["stop", "gil", "regex", "sleep", "skip"]


@pytest.fixture(scope="module")
def hanging(start: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Path]]:
    """Seven jobs at once, for most of their time is waiting. In five, rank 1 does something to step 3 of 6."""
    found = {}

    def begin(name: str, settings: tuple[str, ...], plan: list[At], ranks: list[int] | None = None) -> None:
        run = tmp_path_factory.mktemp(name) / "run"
        found[name] = (start(2, arguments(run, corpus, *settings), plan, ranks), run)

    for what in WHAT:
        begin(what, LIMITS, [At("step", 3, rank=1, do=what)])
    begin("first", ("train.timeout=12",), [At("step", 1, rank=1, do="sleep")])
    begin("absent", ABSENT, [], [0])
    return found


def the_report(run: Path) -> tuple[list[report.Report], str, dict[int, str]]:
    """Rank files, summary, and what is below the head of each rank's file."""
    (folder,) = (run / report.FOLDER).iterdir()
    files = sorted(folder.glob("rank_*.txt"))
    bodies = {rank: path.read_text().partition("\n\n")[2] for rank, path in enumerate(files)}
    return [report.read(path) for path in files], (folder / report.SUMMARY).read_text(), bodies


@pytest.mark.parametrize("what", WHAT)
def test_a_hang_of_one_rank_ends_all_with_a_report(what: str, hanging: dict[str, tuple[Job, Path]]) -> None:
    job, run = hanging[what]
    assert job.codes() == [76, 76], job.text()
    ranks, text, stacks = the_report(run)
    assert [(each.rank, each.phase, each.step) for each in ranks] == [(0, "step", 3), (1, "step", 3)]
    assert text.startswith("HANG: phase step, step 3: no progress for ")
    assert (job.said(0, "stderr") + job.said(1, "stderr")).count(text) == 1  # said once, by one rank
    assert ranks[0].meets and ranks[0].seconds > 1 and "train_step" in stacks[0]
    if what == "skip":
        assert ranks[1].meets and "ranks wait in different places" in text and "train_step" in stacks[1]
        assert ranks[0].place != ranks[1].place
        return
    assert "at fault: rank 1 on " in text and "at fault: rank 0" not in text
    assert "phase step, step 3" in text.splitlines()[1]
    if what == "stop":
        assert ranks[1].state == "stopped by a signal" and "a stopped process cannot tell its stacks" in ranks[1].note
    else:
        assert not ranks[1].meets and "in _happen" in stacks[1]
    if what == "regex":
        assert ranks[1].state == "running" and ranks[1].place.startswith("match (")
    assert losses(run) and len(losses(run)) == 2


def test_a_stopped_rank_under_torchrun(corpus: Path, tmp_path: Path) -> None:
    settings = [*LIMITS, f"run={tmp_path / 'run'}", f"data.path={corpus}"]
    launcher = torchrun(tmp_path, ["step:3:1:stop"], settings)
    try:
        text, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    told = accounts(tmp_path)
    assert {rank: each["exit_code"] for rank, each in told.items()} == {0: 76, 1: 76}, text
    assert all((each["phase"], each["step"]) == ("step", 3) for each in told.values())
    assert "at fault: rank 1 on " in text and "phase step, step 3: stopped by a signal" in text
    assert launcher.returncode == 1  # torchrun's own


def test_the_process_groups_own_time_out_gives_the_same_report(hanging: dict[str, tuple[Job, Path]]) -> None:
    """In the first step, whose limit is an hour, gloo gives up first; what it then raises must not pass for an error."""
    job, run = hanging["first"]
    assert job.codes() == [76, 76], job.text()
    ranks, text, _ = the_report(run)
    assert text.startswith("HANG: an operation of all ranks ran out of time in phase step, step 1")
    assert "at fault: rank 1 on " in text and "at fault: rank 0" not in text
    assert ranks[0].state == "ended" and "imed out" in ranks[0].note


def test_a_rank_that_never_comes(hanging: dict[str, tuple[Job, Path]], corpus: Path, start: Jobs) -> None:
    job, run = hanging["absent"]
    assert job.codes() == [76], job.text()
    ranks, text, _ = the_report(run)
    assert "in phase rendezvous" in text and "at fault: rank 1: no word from it or its watcher" in text
    assert [each.rank for each in ranks] == [0]
    # Watchers that have no name for this start yet do not take the old report for a call, or for what ranks say now.
    old = run / report.FOLDER / next((run / report.FOLDER).iterdir()).name / "rank_00001.txt"
    old.write_text("of an earlier start")
    again = start(2, arguments(run, corpus, *ABSENT), ranks=[0], MASTER_PORT=job.port)
    assert again.codes() == [76], again.text()
    assert not old.exists() and "at fault: rank 1: no word" in again.said(0, "stderr")


def test_one_process_alone(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    job = start(1, arguments(tmp_path / "run", corpus, *LIMITS), [At("model", do="sleep", first=2)])
    assert job.codes() == [76]
    said = job.said(0, "stderr")
    assert "at fault" not in said and "HANG: phase model: no progress for " in said and "(limit 2 s)" in said


def test_where_no_file_can_be_written_the_stacks_are_printed(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    job = start(1, arguments(run, corpus, *LIMITS), [At("rendezvous", do="gil", first=2)])
    assert job.codes() == [76]
    assert "HANG: phase rendezvous: no progress" in job.said(0, "stderr") and "in observe" in job.said(0, "stderr")


def test_no_watchdog_no_alarm(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    limits = ("watchdog.floor=0.2", "watchdog.factor=1", "watchdog.enabled=false")
    job = start(1, arguments(tmp_path, corpus, *limits), [At("step", 5)])
    job.reached("step", 5)
    time.sleep(2.0)
    job.release()
    assert job.codes() == [0], job.text()


def test_a_job_that_was_suspended_has_not_hung(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """Ctrl-Z, and `fg` when the limit is long over. The watcher goes on first: it has to judge before it sees progress."""
    job = start(1, arguments(tmp_path, corpus), [At("step", 5, do="suspend")])
    job.reached("step", 5)
    child, watcher = job.child(0), job.pids[0]
    until(lambda: all(process.state(pid) in process.STOPPED for pid in (child, watcher)))
    (job.folder / "asleep").touch()
    os.kill(watcher, signal.SIGCONT)
    until((job.folder / "awake").exists)
    os.kill(child, signal.SIGCONT)
    assert job.codes() == [0], job.text()


@pytest.mark.campaign  # how long its steps take is for the machine to say; test_parts.py has a slice of one that was recorded
def test_two_hundred_steps_without_a_false_alarm(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """At the default factor, with a floor that says nothing, and with saves and evaluations beside the steps."""
    settings = ("train.steps=200", "checkpoint.every=20", "validation.every=50", "log.every=100", "train.batch=2")
    job = start(1, arguments(tmp_path, corpus, *settings, "watchdog.floor=0.5"))
    assert job.codes(300) == [0], job.text()
    assert len(losses(tmp_path)) == 200 and not (tmp_path / report.FOLDER).exists()
