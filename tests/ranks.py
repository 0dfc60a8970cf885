"""Real ranks for tests: functions in forked processes joined by gloo, and commands under torchrun.

    from tests.ranks import run_ranks

    def halve(rank: int, world: int, x: float) -> float:      # top level, so that it can be pickled by name
        ...
    results = run_ranks(halve, 4, 3.0)                          # [rank 0's result, rank 1's result, ...]

Importing torch takes two seconds, a test of two ranks should not. So each rank is forked from a template process that
has the imports behind it and nothing else: no process group, no thread pool, no test module (these would not survive a
fork, or would carry state from one test to the next). There is one template per set of `preload` modules, started on
first use.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = (
    "torch",
    "torch._dynamo",  # optimizers and FSDP2 import it on first use
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
    "pydantic",
    "yaml",
    # Of this project: what many tests' ranks would import one by one, each for a second.
    "parallel.pipeline",
    "parallel.tensor",
    "parallel.expert.apply",
    "pretrain.checkpoint.lifecycle",
    "pretrain.checkpoint.near.tier",
    "pretrain.equivalence.gate",
    "pretrain.model.decoder",
)
TRAINING = (  # to preload for ranks that train: a run of a few steps takes half a second, these take ten
    "deepspeed",
    "pretrain.train.loop",
    "rich.progress",
    "rich._emoji_codes",
    "sentencepiece",
    "xxhash",
)
PATIENCE = 60.0  # seconds, beyond what ranks may take themselves, to import what is preloaded and to fork
QUIET = {  # for every child: one thread per rank (two cores, several ranks), loopback only, no chatter
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "THP_MEM_ALLOC_ENABLE": "0",  # tests count pages; runs ask for large ones (pretrain/main.py)
}


@dataclass(frozen=True)
class Died:
    """The result of a rank named in `may_die` that ended without returning; exitcode is -9 after a kill -9."""

    exitcode: int


class RanksFailed(AssertionError):
    """At least one rank raised, died or ran out of time. The text holds each one's traceback."""


@dataclass(frozen=True)
class _Job:
    payload: bytes  # pickled (function, args); opened in the ranks only, so that the template stays clean
    world: int
    timeout: float
    leave: float
    may_die: tuple[int, ...]
    environment: dict[str, str]
    sys_path: list[str]
    directory: str


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    may_die: Collection[int] = (),
    preload: Sequence[str] = (),
    leave: float = 30,
) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` processes with a gloo process group; return their results by rank.

    function: importable by name. args and results must pickle (tensors do; DTensors do not: return `.full_tensor()`).
    timeout: seconds for the whole run. Past it every rank's stack is printed in the error and all are ended.
    may_die: ranks that the test kills on purpose. Such a rank yields `Died`, and the others are left to finish.
    leave: seconds that a rank may take to end after it has returned (it leaves its process group, its threads end).
    preload: further modules to have imported before the fork, e.g. ("deepspeed",); where no template has them, one is made.
    Raises RanksFailed. The environment of the calling process at this moment is what the ranks see.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    template = _template(tuple(preload))
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        template.send(
            _Job(
                payload=pickle.dumps((function, args)),
                world=world,
                timeout=timeout,
                leave=leave,
                may_die=tuple(may_die),
                environment={**os.environ, **{k: os.environ.get(k, v) for k, v in QUIET.items()}},
                sys_path=sys.path,
                directory=directory,
            )
        )
        if not template.poll(timeout + leave + PATIENCE):
            for modules in [modules for modules, other in _templates.items() if other is template]:
                del _templates[modules]
            template.close()
            _processes.pop(template).kill()  # its ranks end with it; left alone, it would be waited for at exit
            raise RanksFailed(
                f"no answer from the process that forks the ranks, {PATIENCE} s after they should be gone"
            )
        outcomes, failure = template.recv()
    if failure:
        raise RanksFailed(failure)
    return [o if isinstance(o, Died) else pickle.loads(o) for o in outcomes]


def launch(
    argv: Sequence[str | os.PathLike[str]],
    nproc: int | None = 1,
    *,
    env: dict[str, str] | None = None,
    timeout: float = 120,
    cwd: str | os.PathLike[str] = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --standalone --nproc-per-node N argv...` from the repository root; nproc=None: `python argv`.

    Returns the finished process (returncode, stdout, stderr as text). On timeout, ends the launcher and its workers and
    raises subprocess.TimeoutExpired with what they had printed.
    """
    command = [sys.executable]
    if nproc is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [os.fspath(a) for a in argv]
    environment = {**QUIET, **os.environ, **(env or {})}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ranks = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own; they hold the pipes
        process.terminate()  # torchrun ends its workers, which may have sessions of their own, when asked politely
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()  # psutil knows a pid that was given to another process
            try:
                out, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:  # somebody whose parent was gone before still holds the pipes
                out, err = "", ""
        raise subprocess.TimeoutExpired(command, timeout, out, err) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and that the kernel gives to nobody by itself: it lies below those it deals out."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = secrets.choice(range(max(1024, lowest - 10_000), lowest))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port found")


# ------------------------------------------------------------------------------------------ the template process

_templates: dict[tuple[str, ...], Connection] = {}
_processes: dict[Connection, BaseProcess] = {}


def _template(preload: tuple[str, ...]) -> Connection:
    if preload not in _templates:
        for modules, other in _templates.items():
            if preload and set(preload) <= set(modules):
                _templates[preload] = other
                return other
        ours, theirs = multiprocessing.Pipe()
        before = {k: os.environ.get(k) for k in QUIET}
        os.environ.update({k: v for k, v in QUIET.items() if before[k] is None})  # thread pools are sized at import
        try:
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, PRELOAD + preload))
            process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
        theirs.close()
        _processes[ours] = process
        _templates[preload] = ours
        # multiprocessing joins its children at exit; closing our end first is what lets this one leave.
        atexit.register(ours.close)
    return _templates[preload]


def _serve(calls: Connection, preload: Sequence[str]) -> None:
    for name in preload:
        importlib.import_module(name)
    while True:
        try:
            job = calls.recv()
        except EOFError:
            return
        calls.send(_run(calls, job))


def _run(calls: Connection, job: _Job) -> tuple[list[Any], str]:
    """Fork the ranks, gather what they send, and end those that are left. Returns (results, failure text)."""
    fork = multiprocessing.get_context("fork")
    processes, pipes = [], []
    for rank in range(job.world):
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank, args=(rank, job, send, calls), name=f"rank {rank}")
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    outcomes: list[Any] = [None] * job.world
    failures: list[str] = []
    pending = set(range(job.world))
    deadline = time.monotonic() + job.timeout
    while pending and (left := deadline - time.monotonic()) > 0:
        ready = wait([calls, *(pipes[r] for r in pending)], left)
        if calls in ready:  # only end of file can come now: the test process is gone
            break
        for rank in [r for r in pending if pipes[r] in ready]:
            pending.discard(rank)
            try:
                good, value = pipes[rank].recv()
            except EOFError:
                processes[rank].join()
                good, value = rank in job.may_die, f"died with exit code {processes[rank].exitcode}"
                outcomes[rank] = Died(processes[rank].exitcode or 0)
            else:
                outcomes[rank] = value
            if not good:
                failures.append(f"rank {rank} of {job.world}: {value}")
                # The others usually fail in its wake; a moment's grace shows how, after the cause.
                deadline = min(deadline, time.monotonic() + 0.5)
    if pending and not failures:
        failures += _stacks(job, processes, sorted(pending), f"not done after {job.timeout} s")
    for rank in pending:
        processes[rank].kill()
    deadline = time.monotonic() + job.leave
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    if stuck := [rank for rank, process in enumerate(processes) if process.exitcode is None]:
        failures += _stacks(job, processes, stuck, f"returned, but did not end in {job.leave} s")
        for rank in stuck:
            processes[rank].kill()
            processes[rank].join()
    for pipe in pipes:
        pipe.close()
    return outcomes, "\n".join(failures)


def _stacks(job: _Job, processes: Sequence[Any], ranks: Sequence[int], what: str) -> list[str]:
    """What these ranks did not do, and where each is."""
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR2)
    time.sleep(0.5)
    files = {rank: Path(job.directory, f"stack{rank}") for rank in ranks}
    return [f"rank {rank} of {job.world}: {what}\n{f.read_text() if f.exists() else ''}" for rank, f in files.items()]


def _all_connected(store: Any, rank: int, job: _Job) -> None:
    """Wait until every rank has its group: one that is done at once would close connections that others still make."""
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{other}" for other in range(job.world)], timedelta(seconds=job.timeout))


def _rank(rank: int, job: _Job, send: Connection, calls: Connection) -> None:
    calls.close()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the template
    os.environ.clear()
    os.environ.update(job.environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world), LOCAL_WORLD_SIZE=str(job.world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path[:] = job.sys_path
    stacks = Path(job.directory, f"stack{rank}").open("w")  # noqa: SIM115  open as long as the process lives
    faulthandler.register(signal.SIGUSR2, file=stacks)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        store = dist.FileStore(os.path.join(job.directory, "store"), job.world)  # noqa: PTH118
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=job.world, timeout=timedelta(seconds=job.timeout)
        )
        _all_connected(store, rank, job)
        function, args = pickle.loads(job.payload)
        result = pickle.dumps(function(rank, job.world, *args))
    except BaseException:
        send.send((False, traceback.format_exc()))
    else:
        send.send((True, result))
        if dist.is_initialized():
            dist.destroy_process_group()
