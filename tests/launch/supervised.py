"""Supervisors for tests: processes of their own, for a supervisor ends all processes below it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import QUIET, ROOT

HERE = Path(__file__).parent
# `real` keeps torchrun; otherwise tests/launch/torchrun.py stands in.
START = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
from pathlib import Path
import launch.agent, launch.outcome, launch.supervisor
if sys.argv.pop(1) != "real":
    launch.supervisor.TORCHRUN = Path({str(HERE / "torchrun.py")!r})
launch.outcome.SUMMARY_WAIT = 0.2
launch.agent.LAST_WORDS = float(os.environ.get("LAST_WORDS", launch.agent.LAST_WORDS))
from launch.supervise import main
sys.exit(main())
"""
QUICK = ("--wait", "0.02", "--max-wait", "0.1", "--patience", "0.3")


def begin(
    run: Path,
    *options: str,
    real: bool = False,
    command: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts a supervisor of tests/launch/worker.py, or of another command."""
    script = command or (str(HERE / "worker.py"), f"run={run}")
    return subprocess.Popen(
        [sys.executable, "-c", START, "real" if real else "", *QUICK, *options, "--", *script],
        cwd=ROOT, env={**os.environ, **QUIET, **(environment or {})}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends the supervisor, and with it all below, whatever happens in the test."""
    try:
        yield process
    finally:
        below = family(process.pid) if process.poll() is None else []
        for each in [process, *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()  # without reading to its end: what has escaped may have it open


def supervise(run: Path, plan: list[dict[str, str]], *options: str, **more: Any) -> tuple[int, str]:
    """Runs a supervisor to its end on a plan for the ranks (worker.py): the exit code, and what it said."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "plan.json").write_text(json.dumps(plan))
    with running(begin(run, *options, **more)) as process:
        said = process.communicate(timeout=120)[0]
    return process.returncode, said


def journal(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "supervise.jsonl").read_text().splitlines()]
    return [record for record in records if event in (None, record["event"])]


def until(true: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> Any:
    """Waits for a value that is true, while the process runs."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it has not come"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return value


def notes(run: Path, rank: int = 0) -> list[str]:
    """What a rank has noted: its starts and signals."""
    with contextlib.suppress(FileNotFoundError):
        return (run / "notes" / str(rank)).read_text().splitlines()
    return []


def family(pid: int) -> list[psutil.Process]:
    """All processes below one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def gone(processes: list[psutil.Process], seconds: float = 20) -> bool:
    """Whether all of them end in time."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]
