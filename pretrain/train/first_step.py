"""Where compiled programs are kept, and how long the first step takes with them and without."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from parallel.compilation import Programs, keep_programs
from pretrain.config import RunConfig
from pretrain.train.callback import Callback, Run


def cache_folder(config: RunConfig) -> Path:
    """train.compile_cache, or the user's cache (XDG Base Directory Specification)."""
    if config.train.compile_cache is not None:
        return config.train.compile_cache.absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # By that specification, a relative path there does not count.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "braid" / "compiled"


class FirstStep(Callback):
    """Says how long the first step took, in which programs are made, and how many of them were in the cache already."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.folder: Path | None = None
        self.waiting = False

    def on_start(self, run: Run) -> None:
        # Before anything is compiled, which happens where it is first called.
        if run.config.train.compile or run.processes.device.type == "cuda":
            self.folder = keep_programs(cache_folder(run.config))
            self.waiting = True

    def on_step(self, run: Run) -> None:
        if not self.waiting:
            return
        self.waiting = False
        text = f"first step: {run.record['step_seconds']:.1f} s"
        if run.config.train.compile:
            graphs, found, made = Programs.so_far()
            text += f" with {graphs} graphs: {found} programs from {self.folder}, {made} compiled"
        self.say(text)
