"""Where checks get their facts, so that tests can put others in their place."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from launch.preflight.tools import Answer, Tools

REPOSITORY = Path(__file__).resolve().parents[2]
PROBES = Path(__file__).with_name("probes")
T = TypeVar("T")


class Probed(NamedTuple):
    """What a probe has said: a record for each stage that it has come through."""

    stages: dict[str, dict[str, Any]]
    hung_in: str
    """The stage that was begun and not ended; empty when there is none."""
    answer: Answer


@dataclass
class Node:
    """The machine, and what the caller wants to know of it."""

    folder: Path = Path()
    """The run folder, or where it will be made."""
    limit: float = 60.0
    """Seconds for each process that touches a device or a disk."""
    tool_limit: float = 20.0
    """Seconds for a command such as nvidia-smi."""
    since: float = 60.0
    """Minutes of the kernel's log that count as recent."""
    expected_gpus: int | None = None
    free: int = 10 << 30
    """Bytes that must be free in the run folder."""
    memory: int | None = None
    """Bytes of each device to write and read back; None: most of what is free on a GPU, and a little on the host."""
    stages: tuple[str, ...] = ("matmul", "memory")
    """What each device is to do in its process."""
    root: Path = Path("/")
    """Where proc, sys and dev are found."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    constraints: Path = REPOSITORY / "launch" / "constraints.txt"
    python: tuple[str, ...] = (sys.executable, "-P")
    """Starts a probe. -P: the probes' own folder must not come before the standard library."""
    tools: Tools = field(default_factory=Tools)
    _known: dict[str, Any] = field(default_factory=dict, repr=False)
    _locks: dict[str, threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def path(self, name: str) -> Path:
        """/proc/uptime, say, given as "proc/uptime"."""
        return self.root / name

    def read(self, name: str | Path) -> str | None:
        """A small file of /proc or /sys, stripped; None when it is not there, not readable, or has nothing to say."""
        try:
            return (self.root / name).read_text(errors="replace").strip()
        except OSError:  # also EINVAL, with which the kernel answers for a link that is down
            return None

    def number(self, name: str | Path) -> int | None:
        text = self.read(name)
        try:
            return None if text is None else int(text, 0)
        except ValueError:
            return None

    def folders(self, name: str) -> list[Path]:
        """What is in a folder, sorted by name; nothing when it is not there."""
        try:
            return sorted(self.path(name).iterdir())
        except OSError:
            return []

    def run(self, *command: str, limit: float | None = None) -> Answer:
        """A command of the system, found by this node's PATH, in plain English."""
        environ = {**self.environ, "LC_ALL": "C"}
        return self.tools.run(command, self.tool_limit if limit is None else limit, environ)

    def probe(self, name: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Probed:
        """Runs probes/<name>.py in a process of its own, no longer than `limit`."""
        command = (*self.python, str(PROBES / f"{name}.py"), *arguments)
        answer = self.tools.run(command, self.limit, {**self.environ, **(environ or {})})
        stages: dict[str, dict[str, Any]] = {}
        begun: list[str] = []
        for line in answer.out.splitlines():
            try:
                record = json.loads(line)
                stage = record.pop("stage")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # what a library prints
            if record.pop("begun", False):
                begun.append(stage)
            else:
                stages[stage] = record
        return Probed(stages, next((stage for stage in begun if stage not in stages), ""), answer)

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What `find` returns; asked once, however many checks want to know, also when they ask at the same time."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._known:
                self._known[name] = find()
            found: T = self._known[name]
            return found

    def uptime(self) -> float | None:
        """Seconds since the machine was started."""
        text = self.read("proc/uptime")
        try:
            return None if text is None else float(text.split()[0])
        except (ValueError, IndexError):
            return None

    def torch(self) -> Probed:
        """What torch says of itself and of the devices that it sees."""
        return self.once("torch", lambda: self.probe("torch_build"))


def now() -> str:
    """Local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
