"""A command ends with the code that it decided on, whatever torch's threads are still at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, launch

# Rank 1 sends when rank 0 has nothing left to do but to end, which `last` makes last: the thread of rank 0 that receives then
# has a tensor to let go of, in an interpreter that is no more.
LATE = """
import contextlib, time
import torch, torch.distributed as dist

class Last:
    received = torch.zeros(3)

    def __del__(self, sleep=time.sleep):
        sleep(3)

last = Last()

def main():
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 0:
        dist.broadcast(last.received, 1, async_op=True)
        print("finished")
        return 0
    time.sleep(1)
    with contextlib.suppress(RuntimeError):  # nobody is there any more
        dist.broadcast(torch.ones(3), 1)
    return 0
"""

USUAL = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

class Kept:
    def __del__(self):
        print("the interpreter was taken down")

kept = Kept()
atexit.register(print, "exit function")
pool = ThreadPoolExecutor(1)

def later():
    time.sleep(0.2)
    print("thread", end=" is joined, ")

def main():
    threading.Thread(target=later).start()
    pool.submit(time.sleep, 0.1)
    END
"""


def run(folder: Path, program: str, nproc: int | None = None) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(f"{program}\nfrom parallel.ending import end\nend(main)\n")
    return launch([script], nproc, env={"PYTHONPATH": str(ROOT)})


def test_a_collective_that_ends_after_the_command_does_not_abort_it(tmp_path: Path) -> None:
    done = run(tmp_path, LATE, 2)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    assert "terminate" not in done.stderr


@pytest.mark.parametrize(
    ("ends", "code", "error"),
    [
        ("return 75", 75, ""),
        ("return None", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("sys.exit('no such file')", 1, "no such file\n"),
        ("raise ValueError('of no use')", 1, "ValueError: of no use\n"),
    ],
)
def test_all_else_is_as_with_sys_exit(ends: str, code: int, error: str, tmp_path: Path) -> None:
    done = run(tmp_path, USUAL.replace("END", ends))
    assert (done.returncode, done.stdout) == (code, "thread is joined, exit function\n")
    assert done.stderr.endswith(error) and (error or not done.stderr)


def test_an_interrupt_ends_it_with_the_signal(tmp_path: Path) -> None:
    assert run(tmp_path, USUAL.replace("END", "raise KeyboardInterrupt")).returncode == -2


def test_a_reader_that_left_changes_no_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom parallel.ending import end\n\n"
        "def main():\n    print('what nobody reads')\n    time.sleep(1)\n    return 4\n\nend(main)\n"
    )
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script} | true; exit ${{PIPESTATUS[0]}}"], timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (4, "")
