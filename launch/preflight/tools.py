"""Commands with a time limit that nothing can outwait: not a hung driver, not a process that cannot be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KILL_WAIT = (
    3.0  # seconds for the kernel to end what was killed; a process that waits inside a driver does not end at all
)


class Answer(NamedTuple):
    """What a command said. trouble: why there is no answer, in words; empty when it ran to its end, whatever its exit code."""

    code: int
    out: str
    err: str
    trouble: str = ""
    absent: bool = False
    """The command is not installed."""

    @property
    def ok(self) -> bool:
        return not self.trouble and self.code == 0

    @property
    def why(self) -> str:
        """Why it is of no use, in one line."""
        if self.trouble:
            return self.trouble
        said = (self.err.strip() or self.out.strip()).splitlines()
        how = f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"ended with {self.code}"
        return how + (f": {said[-1].strip()[:200]}" if said else "")


class Tools:
    """Runs commands, for several threads at once, and ends those that are left when nobody wants them any more."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, command: Sequence[str], limit: float, environ: Mapping[str, str] | None = None) -> Answer:
        """limit: seconds until the command and its children are killed. environ: all of its variables, with the PATH."""
        # Files in memory, not pipes: a grandchild that keeps a pipe open would be waited for; and not on a disk, which may
        # be the thing that is full.
        with (
            open(os.memfd_create("out"), "w+b") as out,  # noqa: PTH123 (a descriptor, not a path)
            open(os.memfd_create("err"), "w+b") as err,  # noqa: PTH123
        ):
            name = os.path.basename(command[0])  # noqa: PTH119 (a command, not always a path)
            try:
                with self._lock:
                    if self._closed:
                        return Answer(-1, "", "", "interrupted")
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=None if environ is None else dict(environ),
                        start_new_session=True,  # so that all of it can be killed at once
                    )
                    self._live.add(process)
            except FileNotFoundError:
                return Answer(-1, "", "", f"{name} is not installed", absent=True)
            except OSError as error:
                return Answer(-1, "", "", f"{name} cannot be started: {error.strerror}")
            trouble = ""
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                trouble = f"{name} did not answer within {limit:g} s"
            finally:
                ended = end(process)
                with self._lock:
                    self._live.discard(process)
            if not ended:
                trouble += " and does not end although killed: it waits inside a driver"
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
            code = process.returncode if ended else -signal.SIGKILL
            return Answer(code, texts[0], texts[1], trouble)

    def close(self) -> None:
        """Kills what still runs, and lets nothing new begin."""
        with self._lock:
            self._closed = True
            live = list(self._live)
        for process in live:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes]) -> bool:
    """Kills a process and its children if it still runs; False when that does not end it."""
    if process.poll() is not None:
        return True
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_WAIT)
    except subprocess.TimeoutExpired:
        return False
    return True
