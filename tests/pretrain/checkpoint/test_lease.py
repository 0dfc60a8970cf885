"""One job to a run folder, with real processes and a real kill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.checkpoint.lease import Lease, LeaseHeld
from tests.pretrain.checkpoint import ranks_at_work as work
from tests.ranks import Died, run_ranks


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    ready, run = tmp_path / "ready", tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        job = pool.submit(run_ranks, work.hold_lease, 1, str(run), str(ready), may_die=[0])
        while not (ready.exists() and ready.read_text().endswith(".")):
            assert not job.done(), job.result()
            time.sleep(0.01)
        holder, worker = map(int, ready.read_text().split()[:2])
        try:
            with pytest.raises(LeaseHeld) as caught:
                Lease(run).acquire()
            text = str(caught.value)
            assert f"is in use by process {holder} on {socket.gethostname()} since 20" in text
            assert text.endswith("Stop that job, or choose another run folder.") and caught.value.exit_code == 1
            os.kill(holder, signal.SIGKILL)
            # The worker, alive and forked while the lease was held, keeps the pipe to the template open, so `job` is no
            # sign of the holder's end: ask the lock itself.
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                with contextlib.suppress(LeaseHeld), Lease(run).acquire():
                    break
                time.sleep(0.01)
            else:
                pytest.fail("the lease of a killed job is still held")
            os.kill(worker, 0)  # still there: it was not its end that freed the lease
        finally:
            os.kill(worker, signal.SIGKILL)
        assert job.result() == [Died(-9)]


def test_all_ranks_hear_the_refusal_of_the_one_that_asked(tmp_path: Path) -> None:
    assert run_ranks(work.lease_all, 2, str(tmp_path)) == ["mine", "mine"]  # rank 1 does not compete with rank 0
    with Lease(tmp_path).acquire():
        texts = run_ranks(work.lease_all, 2, str(tmp_path))
    assert texts[0] == texts[1] and f"process {os.getpid()} " in texts[0]


def test_released_lease_can_be_taken_again(tmp_path: Path) -> None:
    with Lease(tmp_path).acquire():
        assert (tmp_path / "lease.json").exists()
    assert not (tmp_path / "lease.json").exists() and (tmp_path / "lease.lock").exists()
    with Lease(tmp_path), pytest.raises(LeaseHeld):  # entering takes it, too
        Lease(tmp_path).acquire()
    lease = Lease(tmp_path).acquire()
    lease.release()
    lease.release()


def test_unknown_holder_is_still_refused(tmp_path: Path) -> None:
    with Lease(tmp_path).acquire():
        (tmp_path / "lease.json").write_text("")
        with pytest.raises(LeaseHeld, match="in use by another job"):
            Lease(tmp_path).acquire()


def test_filesystem_without_locks_gets_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lines: list[str] = []
    with Lease(tmp_path, report=lines.append).acquire():
        assert len(lines) == 1 and "filesystem without locks" in lines[0]
