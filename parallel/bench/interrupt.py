"""Ctrl-C and SIGTERM: noted at once, acted upon by all ranks together.

A rank that left in the middle of a collective would leave the others waiting in it. So the signal only raises a flag,
and the ranks compare flags when they talk anyway, between batches of iterations (timing.py).
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 2.0  # seconds after which another signal is meant as one: launchers may pass the same Ctrl-C on twice


class Interrupted(Exception):
    """All ranks agreed to stop because one was told to. number: the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Holds the number of the signal that arrived, 0 until then. The next one after two seconds ends the process the
    usual way.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._at > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.number:
            self.number, self._at = number, time.monotonic()
