"""Starts the ranks of one run on this machine, as a launcher would, and waits for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from pretrain.verify_resume.worker import Task

GRACE = 30.0  # seconds that the other ranks have to notice that one has failed


def start(task: Task, ranks: int) -> list[int]:
    """Exit codes by rank, negative for a signal. What the ranks print goes to files beside the task's configuration."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, "-m", "pretrain.verify_resume.worker", *task.arguments()]
    processes = []
    try:
        for rank in range(ranks):
            with log_of(task, rank).open("w") as log:
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or some have after one has failed."""
    patience = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < patience:
        if patience == float("inf") and any(process.returncode for process in processes):
            patience = time.monotonic() + GRACE
        time.sleep(0.02)


def log_of(task: Task, rank: int) -> Path:
    """Where a rank's output goes."""
    return task.config.with_suffix(f".rank{rank}.log")


def last_lines(task: Task, rank: int, count: int = 15) -> list[str]:
    path = log_of(task, rank)
    return path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
