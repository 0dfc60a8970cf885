"""Ctrl-C and SIGTERM that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and drops it when that is a destructor or a weak
reference's callback. So the request is also noted, and long loops ask.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = False  # no Event: a second signal within its set() would wait for the lock that the first one's holds
_holding = False


@contextmanager
def noted() -> Iterator[None]:
    """Within it both signals raise KeyboardInterrupt in the main thread, and `check` does so from then on."""
    global _requested
    _requested = False
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested = False


@contextmanager
def held() -> Iterator[None]:
    """Within it both signals wait, for starting a process: it would die with a traceback if its parent did not finish.

    What is started here never sees SIGINT (Ctrl-C reaches a whole group, and the parent decides), but SIGTERM.
    """
    global _holding
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _holding = True
    try:
        yield
    finally:
        _holding = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    check()


def check() -> None:
    """Raises KeyboardInterrupt if one was requested and got lost."""
    if _requested:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if not _holding:
        raise KeyboardInterrupt
