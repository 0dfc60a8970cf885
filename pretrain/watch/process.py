"""What can be seen of a process from outside: its state, where it is in the kernel, and its Python stacks.

The stacks come from faulthandler, whose signal handler is plain C: it needs no lock of Python's, so it also works in a process
where a C function holds that lock. Only a process that is stopped cannot answer.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting in the kernel, uninterruptible",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended",
    "X": "ended",
}
STOPPED = (STATES["T"], STATES["t"])
UNKNOWN = "unknown"  # where a rank is that gave no stacks, or what its process does
ASK = signal.SIGUSR2
QUIET = 0.2  # seconds without another line after which the stacks are complete

# Where ranks wait for each other: torch's collectives, and what forms the groups for them.
_MEETING = ("distributed_c10d.py", "_functional_collectives.py", "c10d_logger.py", "rendezvous.py")
_ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')


class Stacks:
    """A file in memory, made before the fork, into which the training process writes the stacks of all its threads."""

    def __init__(self) -> None:
        self.file = os.memfd_create("stacks")

    def register(self) -> None:
        """In the training process: from now on it answers."""
        faulthandler.register(ASK, file=self.file, all_threads=True, chain=False)

    def ask(self, pid: int, thread: int = 0, seconds: float = 2.0) -> str:
        """The stacks of process `pid` as faulthandler writes them, "" if it does not answer in time.

        thread: whose stack must be among them; the process may be interrupted while it writes.
        """
        begin = os.fstat(self.file).st_size
        try:
            os.kill(pid, ASK)
        except ProcessLookupError:
            return ""
        deadline, size, since = time.monotonic() + seconds, begin, time.monotonic()
        text = ""
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if os.fstat(self.file).st_size != size:
                size, since = os.fstat(self.file).st_size, time.monotonic()
                text = os.pread(self.file, size - begin, begin).decode(errors="replace")
            elif text and time.monotonic() - since > QUIET and (not thread or frames(text, thread)):
                break
        return text


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file.removeprefix(_ROOT)}:{self.line})"


def frames(stacks: str, thread: int) -> list[Frame]:
    """The stack of one thread out of what `Stacks.ask` returns, innermost first."""
    found: list[Frame] = []
    mine = False
    for line in stacks.splitlines():
        if "hread 0x" in line:
            mine = re.search(rf"0x0*{thread:x}\b", line) is not None
        elif mine and (match := _FRAME.match(line)):
            found.append(Frame(match["file"], int(match["line"]), match["function"]))
    return found


def meets(stack: list[Frame]) -> bool:
    """Whether this is a process that waits for other ranks. A wait for a GPU, which may do the same, cannot be told from work."""
    inner = "/torch/distributed/" in stack[0].file if stack else False
    return inner or any(Path(frame.file).name in _MEETING for frame in stack[:4])


def place(stack: list[Frame]) -> str:
    """`all_reduce (.../distributed_c10d.py:3021), called by sum (parallel/processes.py:62)`"""
    if not stack:
        return UNKNOWN
    inner = stack[0]
    # Decorators hide the collective's own name.
    shown = next((frame for frame in stack[:4] if frame.function != "wrapper"), inner)
    ours = next((frame for frame in stack if frame.file.startswith(_ROOT) and "site-packages" not in frame.file), inner)
    return str(shown) if ours is shown else f"{shown}, called by {ours}"


def state(pid: int) -> str:
    """One of STATES' values, as /proc says."""
    try:
        # The name of the program, in parentheses, may hold anything.
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return UNKNOWN
    return STATES.get(letter, letter)


def kernel(pid: int) -> list[str]:
    """Where the main thread is in the kernel; what of it this user may read."""
    lines: list[str] = []
    for name in ("wchan", "stack"):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text().strip()
        except OSError:
            continue
        if text not in ("", "0"):
            lines.append(f"kernel {name}: " + "\n  ".join(["", *text.splitlines()] if "\n" in text else [text]))
    return lines
