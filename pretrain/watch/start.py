"""Starts a training process under a watcher."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from pretrain.exit import PREEMPTED
from pretrain.train import heartbeat
from pretrain.watch.process import Stacks
from pretrain.watch.pulse import Pulse
from pretrain.watch.watcher import ASKED, SIGNALS, Watcher

PR_SET_PDEATHSIG = 1


def watched(work: Callable[[], int]) -> int:
    """Runs `work` in a child process under a watcher; returns its exit code, in either process.

    To be called while nothing heavy is imported and no thread runs. Where the system cannot wait for signals as this needs
    (only Linux can), `work` runs in this process, unwatched.
    """
    if not hasattr(signal, "sigtimedwait") or not hasattr(os, "memfd_create"):
        return work()
    pulse, stacks = Pulse(), Stacks()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # a launcher may have left it ignored, and then nobody hears of a child's end
    # Blocked before the fork, so that there is no moment at which a signal would be lost, or end either process its own way.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getpid()
    # If torchrun's agent is killed, nobody else would tell its ranks to end.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _when_the_parent_dies(signal.SIGTERM)
    child = os.fork()
    if child:
        return Watcher(child, pulse, stacks).run()
    _set_up(parent, pulse, stacks)
    try:
        return work()
    finally:
        for number in ASKED:  # what is left is to end, and the exit code is decided
            signal.signal(number, signal.SIG_IGN)


def _set_up(parent: int, pulse: Pulse, stacks: Stacks) -> None:
    """In the training process: never outlive the watcher, answer it, and leave at a signal while there is nothing to save."""
    _when_the_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(PREEMPTED)
    stacks.register()
    pulse.tell(thread=threading.main_thread().ident)
    heartbeat.attach(pulse)
    for number in ASKED:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    heartbeat.phase("start")


def _when_the_parent_dies(number: int) -> None:
    """This process then gets the signal. Where there is no prctl, whose parent is killed is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _leave(number: int, frame: FrameType | None) -> None:
    # Not by an exception: imports are under way, and not everything in them lets one through.
    os._exit(PREEMPTED)
