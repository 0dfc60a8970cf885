"""The journal survives kills and full disks, takes lines from many hosts, and can be read."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from launch.journal import Journal
from launch.supervise import main


def write(run: Path, host: str) -> None:
    for number in range(25):
        Journal(run).append({"event": "start", "host": host, "number": number, "padding": "x" * 2000})


def test_lines_of_several_writers_stay_whole_and_in_order(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(tmp_path, host)) for host in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = Journal(tmp_path).records()
    for host in "abc":
        assert [record["number"] for record in records if record["host"] == host] == list(range(25))


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"event": "start", "host": "a"})
    with journal.path.open("a") as file:
        file.write('{"event": "end", "ho')
    place = journal.append({"event": "start", "host": "b"})
    assert place is not None
    journal.append({"event": "start", "host": "c"})
    assert [record["host"] for record in journal.records()] == ["a", "b", "c"]
    assert [record["host"] for record in journal.records(place)] == ["c"]


def test_a_journal_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path)
    journal.path.symlink_to("/dev/full")
    assert journal.append({"event": "start", "host": "a"}) is None
    assert "supervise.jsonl: No space left on device; not noted" in capsys.readouterr().err
    assert Journal(Path("/proc")).append({"event": "start", "host": "a"}) is None


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path)
    journal.append({"event": "start", "host": "n1", "nodes": "1:2", "processes": "8", "newest": None})
    rank = {"rank": 3, "local_rank": 3, "code": -9, "time": 1.0, "phase": "step", "step": 41, "message": "x"}
    journal.append(
        {"event": "end", "host": "n1", "ranks": [rank], "step": 41, "newest": "step_00000040", "decision": "restart",
         "code": 137, "why": "rank 3 is gone", "wait": 4.25}
    )  # fmt: skip
    journal.append(
        {"event": "after", "host": "n1", "decision": "stop", "code": 75, "why": "n2: preempted", "wait": 0.0}
    )
    assert main(["--readmit", "n7", str(tmp_path)]) == 0
    assert main(["--journal", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in ("torchrun with 1:2 node(s) x 8 rank(s)", "rank 3: SIGKILL in step 41", "restart: rank 3 is gone (waits 4.2 s)",
                 "step_00000040", "stop: n2: preempted (exit code 75)", "n7"):  # fmt: skip
        assert part in said, said
    assert main(["--journal", str(tmp_path / "none")]) == 2
