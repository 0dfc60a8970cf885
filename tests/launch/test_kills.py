"""kill -9 of a rank, of torchrun (the real one) and of the supervisor: the job goes on, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.launch.supervised import begin, family, gone, journal, notes, running, until


def ranks_of(run: Path) -> list[int]:
    """Processes of the newest launch."""
    return [int(notes(run, rank)[-1].split()[1]) for rank in (0, 1)]


@pytest.mark.parametrize("victim", ["rank", "torchrun"])
def test_kill_9_of_a_rank_or_of_torchrun(victim: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "wait"}, {"*": "save 4"}]')
    with running(begin(tmp_path, "--nproc-per-node", "2", real=True)) as process:
        until(lambda: notes(tmp_path, 0) and notes(tmp_path, 1), process)
        ranks = ranks_of(tmp_path)
        below = family(process.pid)
        torchrun = psutil.Process(ranks[0]).ppid()
        os.kill(ranks[1] if victim == "rank" else torchrun, signal.SIGKILL)
        assert process.wait(60) == 0
        assert gone(below)
    first, second = journal(tmp_path, "end")
    assert (first["decision"], first["code"], second["code"]) == ("restart", 137, 0)
    assert first["launcher"] == (1 if victim == "rank" else -9)
    if victim == "rank":
        assert [rank["code"] for rank in first["ranks"] if rank["rank"] == 1] == [-9]


def test_kill_9_of_the_supervisor_ends_all_below_it_after_a_save(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('[{"*": "wait"}]')
    with running(begin(tmp_path, "--nproc-per-node", "2", real=True)) as process:
        until(lambda: notes(tmp_path, 0) and notes(tmp_path, 1), process)
        below = family(process.pid)
        assert len(below) >= 3
        process.kill()
        process.wait()
        assert gone(below), below
    assert notes(tmp_path)[1:] == ["SIGTERM"] and (tmp_path / "checkpoints/step_00000099").is_dir()
