"""One torchrun under supervision: signals go to its ranks, and nothing that it started outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import psutil

PR_SET_CHILD_SUBREAPER = 36
POLL = 0.1  # seconds
LOOK_AROUND = 2.0  # seconds between two looks at what other hosts have decided
LAST_WORDS = 20.0  # seconds that a torchrun whose ranks have ended has to end by itself, from when nobody waits for it
KILL_PATIENCE = 30.0  # seconds for the kernel to end what was killed; devices and disks can hold a process


class Requests:
    """The signals that ask this supervisor to stop.

    The first one counts. Those within `patience` seconds of it are the same request: schedulers signal more than once. A later
    one means that whoever asks will not wait for a save.
    """

    WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self, patience: float = 10.0):
        self.patience = patience
        self.first: signal.Signals | None = None
        self.insistent = False
        self._since = 0.0

    def watch(self) -> None:
        for number in self.WATCHED:
            # nohup has the hang-up ignored, a shell the Ctrl-C of what it runs in the background: that stays so.
            if number in (signal.SIGTERM, signal.SIGUSR1) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = signal.Signals(number), now
        elif now - self._since > self.patience:
            self.insistent = True

    @property
    def name(self) -> str | None:
        return None if self.first is None else self.first.name

    @property
    def for_ranks(self) -> int:
        """Ranks know two signals: save and leave."""
        return signal.SIGUSR1 if self.first == signal.SIGUSR1 else signal.SIGTERM


def adopt_orphans() -> None:
    """From now on, processes whose parents die become this process's children: ranks of a torchrun that was killed."""
    with contextlib.suppress(AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def run(
    command: Sequence[str], requests: Requests, overtaken: Callable[[], bool], begun: Callable[[], bool] = lambda: False
) -> int:
    """Runs a torchrun to its end and returns its exit code, negative for a signal.

    A request goes straight to the ranks: torchrun would kill them half a minute later, in the middle of a long save. torchrun
    itself is ended when the request is repeated, or when it has no ranks: either on a request, or when `overtaken` says that the
    job goes on or ends without this launch. Ranks that have `begun` and ended are another matter than ranks yet to come: then
    torchrun is about to say how they ended, a little later, perhaps, than on the host that has noted the end of the job.
    """
    process = subprocess.Popen(command, start_new_session=True)  # so that a Ctrl-C comes to this process alone
    told: set[int] = set()
    ended = False
    look = time.monotonic()
    empty: float | None = None  # since when it has had no ranks, while nobody waits for it
    try:
        while process.poll() is None:
            now = time.monotonic()
            if requests.first is not None or now >= look:
                look = now + LOOK_AROUND
                ranks = _children(process.pid)
                over = requests.first is not None or (not ranks and overtaken())
                empty = (empty or now) if over and not ranks else None
                idle = empty is not None and (not begun() or now - empty > LAST_WORDS)
                if requests.first is not None:
                    for pid in ranks - told:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, requests.for_ranks)
                    told |= ranks
                    end = requests.insistent or (idle and not told)
                else:
                    end = idle
                if end and not ended:
                    process.terminate()
                    ended = True
            time.sleep(POLL)
    finally:
        end_all()
    return process.returncode


def _children(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children()}
    except psutil.Error:
        return set()


def end_all() -> None:
    """Kills every process below this one. After a torchrun that ended by itself there is none."""
    end = time.monotonic() + KILL_PATIENCE
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)  # which also reaps them
        if time.monotonic() > end:
            pids = ", ".join(str(process.pid) for process in left)
            print(f"supervise: processes {pids} do not end although killed", file=sys.stderr, flush=True)
            return
