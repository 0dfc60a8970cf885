"""What runs the ranks must itself be trusted: results in order, errors with traceback, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.ranks import Died, RanksFailed, launch, run_ranks


def sum_of_ranks(rank: int, world: int, offset: int) -> tuple[int, int, str]:
    import torch
    import torch.distributed as dist

    x = torch.tensor(rank + offset)
    dist.all_reduce(x)
    return rank, int(x), os.environ.get("RANKS_TEST", "")


def fail_on_one(rank: int, world: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise KeyError("the cause")
    time.sleep(60)


def hang(rank: int, world: int) -> None:
    time.sleep(60)


def die(rank: int, world: int) -> int:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def stay(rank: int, world: int) -> None:
    if rank == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()


def threads(rank: int, world: int) -> tuple[int, int]:
    import torch

    return len(list(Path(f"/proc/{os.getppid()}/task").iterdir())), torch.get_num_threads()


def test_results_come_in_rank_order_and_the_environment_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS_TEST", "now")
    assert run_ranks(sum_of_ranks, 3, 10) == [(0, 33, "now"), (1, 33, "now"), (2, 33, "now")]


def test_failing_rank_is_reported_and_the_others_are_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)^rank 1 of 2.*the cause") as caught:
        run_ranks(fail_on_one, 2, str(tmp_path))
    assert "fail_on_one" in str(caught.value)  # the traceback, not only the message
    assert time.monotonic() - start < 50
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_timeout_shows_where_each_rank_is() -> None:
    with pytest.raises(RanksFailed, match="rank 0 of 1: not done after 4 s") as caught:
        run_ranks(hang, 1, timeout=4)
    assert "in hang" in str(caught.value)


def test_a_rank_that_returns_and_does_not_end_is_named_with_its_place() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 1 of 2: returned, but did not end in 2 s") as caught:
        run_ranks(stay, 2, leave=2)
    assert "_shutdown" in str(caught.value) and "rank 0" not in str(caught.value)


def test_death_is_an_error_unless_planned() -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2: died with exit code -9"):
        run_ranks(die, 2)
    assert run_ranks(die, 2, may_die=[1]) == [0, Died(-9)]


def test_ranks_are_forked_from_a_single_threaded_process() -> None:
    assert run_ranks(threads, 1) == [(1, 1)]


def test_launch_returns_the_finished_process() -> None:
    done = launch(["-c", "import os; print('cwd', os.path.isfile('pyproject.toml')); raise SystemExit(3)"], None)
    assert (done.returncode, done.stdout.strip()) == (3, "cwd True")


def test_launch_starts_ranks_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "hello.py"
    script.write_text("import os\nprint(f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n\", end='')\n")
    done = launch([script], nproc=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_launch_ends_what_it_started_on_timeout() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        launch(["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], None, timeout=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(caught.value.output), 0)
