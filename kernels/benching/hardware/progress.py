"""One line on stderr that says how far the benchmark is: rewritten in place on a terminal, now and then elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

EVERY = 15.0  # seconds between lines where nothing can be rewritten


class Progress:
    def __init__(self, out: TextIO | None = None):
        self.out = sys.stderr if out is None else out
        self.live = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.said = time.monotonic()

    def say(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self.out, flush=True)
        elif now - self.said >= EVERY:
            print(text, file=self.out, flush=True)
            self.said = now

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.out, flush=True)
