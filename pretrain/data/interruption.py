"""Ctrl-C and SIGTERM that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and drops it when that is a destructor or a weak
reference's callback. So the request is also noted, and long loops ask.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = threading.Event()


@contextmanager
def noted() -> Iterator[None]:
    """Within it both signals raise KeyboardInterrupt in the main thread, and `check` does so from then on."""
    _requested.clear()
    before = {number: signal.signal(number, _note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()


def check() -> None:
    """Raises KeyboardInterrupt if one was requested and got lost."""
    if _requested.is_set():
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _requested.set()
    raise KeyboardInterrupt
