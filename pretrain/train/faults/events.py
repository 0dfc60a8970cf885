"""events.jsonl: what happened to a run that its metrics do not show. Lines are only ever added, over rollbacks and restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pretrain.exit import Exit
from pretrain.train.metrics import finite

FILE = "events.jsonl"


class Events:
    """write: on the one rank that owns the run folder. say: shows a line to whoever watches."""

    def __init__(self, folder: Path, write: bool, say: Callable[[str], None]):
        self.path, self.write, self.say = folder / FILE, write, say

    def add(self, step: int, what: str, text: str, **numbers: Any) -> None:
        """step: the one it happened in, counted from 1 as in metrics.jsonl."""
        self.say(f"step {step}: {text}")
        if not self.write:
            return
        record = {"time": round(time.time(), 3), "step": step, "event": what, "text": text, **numbers}
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(finite(record), allow_nan=False) + "\n")

    def stop(self, step: int, text: str, code: int) -> NoReturn:
        """Ends the run, on all ranks with the same words."""
        self.add(step, "stop", text, code=code)
        raise Exit(f"step {step}: {text}", code)
