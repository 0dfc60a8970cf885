"""What a host's supervisor takes from the other hosts' notes, and when it looks: in one process, torchrun left out."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import agent
from launch.journal import Journal
from launch.outcome import Outcome
from launch.policy import Decision
from launch.supervise import parse
from launch.supervisor import Supervisor
from pretrain import exit as codes


class Nobody:
    """Asks for nothing."""

    first = name = None


def supervisor(run: Path, host: str) -> Supervisor:
    options = ["--nnodes", "1:2", "--rdzv-endpoint", "x:1", "--wait", "0.01", "--host", host]
    options += ["--", "x.py", f"run={run}"]
    return Supervisor(parse(options), Nobody())  # type: ignore[arg-type]


def stop(of: Supervisor) -> None:
    of._note("end", decision="stop", code=77, scope="job", why="no data")


def test_a_stop_noted_between_a_look_around_and_the_next_start_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = supervisor(tmp_path, "n0"), supervisor(tmp_path, "n1")
    seen: list[Any] = []
    look = here._look_around

    def late(decision: Decision, started: float) -> Decision:
        found = look(decision, started)
        if len(seen) == 1:
            stop(other)
        return found

    def launch(started: float) -> Outcome:
        seen.append(here._others())
        return Outcome((), 1, 1)

    monkeypatch.setattr(here, "_look_around", late)
    monkeypatch.setattr(here, "_launch", launch)
    assert here._once() is None and seen == [None]
    decision = here._once()
    assert seen[1]["why"] == "no data"  # torchrun, which might wait for that host, would be ended
    assert decision is not None and (decision.action, decision.code) == ("stop", 77)


def test_what_was_noted_before_this_supervisor_began_is_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(supervisor(tmp_path, "n1"))
    here = supervisor(tmp_path, "n0")
    monkeypatch.setattr(here, "_launch", lambda started: Outcome((), 1, 1))
    assert here._once() is None


def test_after_a_numerical_fault_it_waits_for_those_that_were_under_way(tmp_path: Path) -> None:
    here, other, idle = (supervisor(tmp_path, f"n{i}") for i in range(3))
    for each in (here, other, idle):
        each._note("start")
    idle._note("end", decision="restart", code=1)
    here._note("end", decision="stop", code=codes.NUMERICAL)
    idle._note("start")  # it begins again: of no concern
    assert here._under_way() == {"n1"}
    waiting = threading.Thread(target=here._settle)
    waiting.start()
    time.sleep(3 * agent.POLL)
    assert waiting.is_alive()
    other._note("end", decision="stop", code=codes.NUMERICAL)
    waiting.join(30)
    assert not waiting.is_alive() and here._under_way() == set()
    assert "n0" not in other._under_way()  # whose end came before its own


def test_the_place_after_a_line_is_before_what_another_host_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That host has waited for the lock as long as it does, while this one's disk took its time."""
    journal = Journal(tmp_path)

    def slow(descriptor: int) -> None:
        monkeypatch.undo()
        monkeypatch.setattr("launch.journal._lock", lambda descriptor: None)
        journal.append({"event": "end", "host": "b"})

    monkeypatch.setattr("os.fsync", slow)
    place = journal.append({"event": "start", "host": "a"})
    assert place is not None
    assert [record["host"] for record in journal.records(place)] == ["b"]
    records, after = journal.read(place)
    assert [record["host"] for record in records] == ["b"] and after == journal.path.stat().st_size
    assert journal.read(after) == ([], after)
