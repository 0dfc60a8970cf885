"""However a training process ends, its watcher tells it truly; and neither outlives the other."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.watch import process
from tests.pretrain.train.small_run import SETTINGS
from tests.pretrain.watch.plan import At
from tests.pretrain.watch.watched import Job, Jobs, arguments, until
from tests.ranks import QUIET, ROOT


def account(file: Path) -> dict[str, Any]:
    """What a watcher wrote for torchrun, in one."""
    content = json.loads(file.read_text())["message"]
    return {"message": content["message"], **content["extraInfo"]}


def test_a_finished_job(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    error = tmp_path / "error.json"
    job = start(1, arguments(tmp_path / "run", corpus), [At("step", 2)], TORCHELASTIC_ERROR_FILE=str(error))
    job.reached("step", 2)
    child = job.child(0)
    # In front of the same terminal, and in the run folder there is one process only.
    assert os.getpgid(child) == os.getpgid(job.pids[0])
    opened = {pid: {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()} for pid in (child, job.pids[0])}
    lock = str(tmp_path / "run" / "lease.lock")
    assert lock in opened[child] and lock not in opened[job.pids[0]]
    job.release()
    assert job.codes() == [0] and "finished 6 steps" in job.said(0) and not error.exists()


@pytest.mark.parametrize(("do", "code"), [("error", 1), ("kill", -9)])
def test_errors_and_kills_come_through_with_an_account(
    do: str, code: int, corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    error = tmp_path / "error.json"
    job = start(1, arguments(tmp_path / "run", corpus), [At("step", 4, do=do)], TORCHELASTIC_ERROR_FILE=str(error))
    assert job.codes() == [code]
    told = account(error)
    assert abs(time.time() - float(told.pop("timestamp"))) < 300 and told.pop("host")
    text = "RuntimeError: an error made by a test"
    if do == "kill":
        text = "the training process was ended by SIGKILL in phase step, step 4"
        assert text in job.said(0, "stderr")
    assert told == {
        "message": text, "exit_code": code, "rank": 0, "local_rank": 0, "phase": "step", "step": 4,
        "signal": 9 if do == "kill" else None,
    }  # fmt: skip


def test_a_wrong_configuration_comes_through_with_an_account(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    error = tmp_path / "error.json"
    job = start(1, arguments(tmp_path / "run", corpus, "train.stepz=3"), TORCHELASTIC_ERROR_FILE=str(error))
    assert job.codes() == [2] and job.said(0, "stderr").count("did you mean 'steps'?") == 1
    told = account(error)
    assert "train.stepz" in told["message"] and told["exit_code"] == 2 and told["phase"] == "start"
    assert told["step"] is None


def gone(pid: int) -> bool:
    return process.state(pid) in ("unknown", "ended")


def test_a_watcher_that_is_killed_takes_the_training_process_along(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    job = start(1, arguments(tmp_path, corpus), [At("step", 2, do="gil")])
    job.reached("step", 2)
    child = job.child(0)
    job.signal(signal.SIGKILL)
    assert job.codes() == [-9]
    until(lambda: gone(child), timeout=10)


RANK = """
import pathlib, signal, sys, time
from pretrain.train import heartbeat
from pretrain.watch.pulse import OWN
from pretrain.watch.start import watched

def work():
    folder = pathlib.Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(75))
    heartbeat.keep(OWN)  # so that the watcher waits for the save
    (folder / "pid").write_text(str(__import__("os").getpid()))
    time.sleep(60)

sys.exit(watched(work))
"""


def test_torchrun_killed_together_with_its_supervisor_leaves_no_ranks(tmp_path: Path) -> None:
    # Its agent is a process between the two: it starts a rank, says which, and is killed.
    agent = "import subprocess, sys; print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True); input()"
    command = [sys.executable, "-c", agent, "-c", RANK, str(tmp_path)]
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "run", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        watcher = int(started.stdout.readline())
        until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
        started.kill()
    until(lambda: gone(watcher) and gone(int((tmp_path / "pid").read_text())), timeout=20)
    assert (tmp_path / "saved").exists()  # it was asked, not killed


def test_ctrl_c_and_the_progress_bar_in_a_terminal(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    ours, theirs = pty.openpty()
    said = bytearray()

    def read() -> None:
        """All of it, as a terminal does: what nobody reads is kept up to 4 KiB only."""
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while piece := os.read(ours, 1 << 16):
                said.extend(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    job = start(1, arguments(tmp_path, corpus, "train.steps=100000"), [At("step", 4)], terminal=os.ttyname(theirs))
    job.reached("step", 4)
    os.write(ours, b"\x03")  # to all that is in front: the training process gets it once, from the terminal
    assert job.codes() == [130]
    os.close(theirs)
    reader.join(60)
    os.close(ours)
    text = said.decode(errors="replace")  # Ctrl-C drops what is on its way, and may cut a character in two
    assert "0/100000" in text and "━━━" in text and "loss" in text  # the bar
    assert text.count("KeyboardInterrupt") <= 1  # as often as it was pressed


def test_an_interrupt_sent_to_the_watcher_alone_reaches_the_training_process(
    corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    job = start(1, arguments(tmp_path, corpus), [At("step", 2)])
    job.reached("step", 2)
    job.signal(signal.SIGINT)
    assert job.codes() == [130]


def torchrun(folder: Path, plan: list[str], settings: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    """The real thing: torchrun, cold processes, errors as torchrun collects them, below `folder`/log."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(folder / "log"), str(Path(__file__).with_name("plan.py")), str(folder), *plan, "--"]
    command += ["--config", "configs/runs/quickstart.yaml", *SETTINGS, "train.precision=fp32", *settings]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def accounts(folder: Path) -> dict[int, dict[str, Any]]:
    found = [account(path) for path in (folder / "log").rglob("error.json")]
    return {each["rank"]: each for each in found}


@pytest.mark.campaign  # what torchrun does, with processes that start cold; test_signals.py does the same to warm ones
def test_torchrun_passes_a_signal_on_and_reads_the_accounts(corpus: Path, tmp_path: Path) -> None:
    settings = ["train.steps=100000", "checkpoint.every=100000", f"run={tmp_path / 'run'}", f"data.path={corpus}"]
    launcher = torchrun(tmp_path, ["step:3::hold"], settings)
    try:
        job = Job(None, tmp_path, {0: 0, 1: 0})  # type: ignore[arg-type]
        job.text = lambda: ""  # type: ignore[method-assign]
        job.reached("step", 3)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        sizes = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in workers]
        assert len(sizes) == 2 and all(int(pages) * os.sysconf("SC_PAGE_SIZE") < 64 * 2**20 for pages in sizes)
        launcher.send_signal(signal.SIGTERM)
        job.heard(signal.SIGTERM)
        job.release()
        text, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) in (3, 4), text
    assert "stopped by SIGTERM" in text
    assert {rank: told["exit_code"] for rank, told in accounts(tmp_path).items()} == {0: 75, 1: 75}
