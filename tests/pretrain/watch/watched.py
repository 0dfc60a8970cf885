"""Training commands with their watchers, as launchers start them, but warm; and things that happen to them in certain places.

    with jobs() as start:
        job = start(world, arguments, [At("step", 3, rank=1, do="stop")], timeout ...)
        job.reached("step", 3); job.signal(signal.SIGTERM, 0); job.codes()

A template process has torch imported and no threads. Each rank is forked from it in a session of its own, as torchrun does, and
runs `pretrain.main.main`, which forks the training process: both are real, only the two seconds of imports are missing.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.pretrain.train.small_run import SETTINGS
from tests.pretrain.watch.plan import At, run
from tests.ranks import PRELOAD, QUIET, TRAINING, free_port

WAIT = 60.0  # seconds for anything that is sure to happen
MODULES = (*PRELOAD, *TRAINING)


@dataclass(frozen=True)
class _Request:
    world: int
    ranks: tuple[int, ...]
    arguments: list[str]
    plan: list[At]
    environment: dict[str, str]
    folder: str
    repeat: float
    terminal: str | None


@dataclass
class Job:
    """pids: of the watchers, by rank."""

    calls: Connection
    folder: Path
    pids: dict[int, int]
    port: str = ""
    ended: dict[int, int] = field(default_factory=dict)
    known: Counter[Path] = field(default_factory=Counter)  # notes of signals that `heard` has waited for

    def child(self, rank: int) -> int:
        """The training process of a rank."""
        text = Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children").read_text().split()
        return int(text[0])

    def reached(self, phase: str, step: int | None = None, ranks: Sequence[int] | None = None) -> None:
        """Waits until these ranks, or all, are where something happens to them."""
        names = [self.folder / f"at-{phase}-{step}-{rank}" for rank in (self.pids if ranks is None else ranks)]
        until(lambda: all(name.exists() for name in names), lambda: f"never reached {phase} {step}:\n{self.text()}")

    def release(self) -> None:
        """Ends every hold."""
        (self.folder / "release").touch()

    def signal(self, number: int, *ranks: int, group: bool = False) -> None:
        """To the watchers of these ranks, or of all; group: to all processes of the rank, as torchrun and srun do."""
        for rank in ranks or self.pids:
            (os.killpg if group else os.kill)(self.pids[rank], number)

    def heard(self, number: int, *ranks: int) -> None:
        """Waits until the watchers of these ranks, or of all, have acted upon one more signal of this number: what the test does
        next then comes after it, however busy the machine is."""
        notes = [self.folder / f"heard-{int(number)}-{rank}" for rank in ranks or self.pids]
        self.known.update(notes)
        until(lambda: all(note.exists() and note.stat().st_size >= self.known[note] for note in notes), self.text)

    def codes(self, timeout: float = WAIT) -> list[int]:
        """The exit codes of the watchers by rank, minus the signal of one that was killed."""
        deadline = time.monotonic() + timeout
        while len(self.ended) < len(self.pids):
            self.calls.send("ended")
            self.ended |= {rank: code for pid, code in self.calls.recv().items() for rank in self._ranks(pid)}
            if time.monotonic() > deadline:
                raise AssertionError(f"not ended after {timeout} s, only {self.ended}:\n{self.text()}")
            time.sleep(0.02)
        return [self.ended[rank] for rank in sorted(self.pids)]

    def _ranks(self, pid: int) -> list[int]:
        return [rank for rank, own in self.pids.items() if own == pid]

    def said(self, rank: int, stream: str = "stdout") -> str:
        file = self.folder / f"{stream}-{rank}"
        return file.read_text() if file.exists() else ""

    def text(self) -> str:
        return "\n".join(f"rank {rank}: {self.said(rank)}{self.said(rank, 'stderr')}"[-3000:] for rank in self.pids)

    def close(self) -> None:
        self.release()
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


def until(true: Any, otherwise: Any = lambda: "", timeout: float = WAIT) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


def arguments(run: Path, corpus: Path, *overrides: str) -> list[str]:
    quick = ("train.precision=fp32", "train.micro_batch=2", "validation.sequences=4", *overrides)
    return ["--config", "configs/runs/quickstart.yaml", *SETTINGS, *quick, f"run={run}", f"data.path={corpus}"]


class Jobs:
    """Call it to start a job: like `torchrun --nproc-per-node WORLD pretrain/main.py ARGUMENTS`."""

    def __init__(self) -> None:
        self.calls, theirs = multiprocessing.Pipe()
        before = dict(os.environ)
        os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
        try:
            self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.started: list[Job] = []
        self.folder = tempfile.TemporaryDirectory(prefix="watched-")

    def __call__(
        self,
        world: int,
        arguments: list[str],
        plan: Sequence[At] = (),
        ranks: Sequence[int] | None = None,
        repeat: float = 3.0,
        terminal: str | None = None,
        **environment: str,
    ) -> Job:
        """ranks: start only these. repeat: the watchers' REPEAT. terminal: to be in front of. environment: more variables."""
        folder = Path(self.folder.name, str(len(self.started)))
        folder.mkdir()
        chosen = tuple(range(world) if ranks is None else ranks)
        more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)} | environment
        self.calls.send(_Request(world, chosen, arguments, list(plan), more, str(folder), repeat, terminal))
        pids = self.calls.recv()
        job = Job(self.calls, folder, dict(zip(chosen, pids)), more["MASTER_PORT"])
        self.started.append(job)
        return job

    def close(self) -> None:
        for job in self.started:
            job.close()
        self.calls.close()
        self.process.join(10)
        self.folder.cleanup()


@contextlib.contextmanager
def jobs() -> Iterator[Jobs]:
    started = Jobs()
    try:
        yield started
    finally:
        started.close()


# ------------------------------------------------------------------------------------------ in the template process


def _serve(calls: Connection) -> None:
    for name in MODULES:
        importlib.import_module(name)
    # The slowest things in a job of six steps.
    importlib.import_module("pretrain.train.plot").draw = lambda folder: folder
    importlib.import_module("pretrain.train.loop")._peaks = lambda run: (None, 1e18, None)
    unreported: dict[int, int] = {}
    while True:
        try:
            request = calls.recv()
        except EOFError:
            return
        if request == "ended":
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    unreported[found[0]] = os.waitstatus_to_exitcode(found[1])
            calls.send(unreported)
        else:
            pids = [_fork(request, rank, calls) for rank in request.ranks]
            for pid in pids:
                unreported.pop(pid, None)  # another job's process of that number, which ended long ago
            calls.send(pids)


def _fork(request: _Request, rank: int, calls: Connection) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
        calls.close()
        for stream, number in (("stdout", 1), ("stderr", 2)):
            file = request.terminal or f"{request.folder}/{stream}-{rank}"  # a session's first terminal is its own
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(request.environment, RANK=str(rank), LOCAL_RANK=str(rank))
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        run(request.arguments, request.plan, Path(request.folder), rank, request.repeat)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
