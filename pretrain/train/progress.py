"""The progress line: a live bar in a terminal, a plain line every few steps elsewhere."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

from pretrain.figures import human
from pretrain.train.callback import Callback, Run

WINDOW = 20  # steps over which speed and remaining time are averaged


class Progress(Callback):
    def __init__(self, every: int):
        self.every = every
        self.seconds: deque[float] = deque(maxlen=WINDOW)
        self.bar: Any = None
        self.console: Any = None
        self.task: Any = None

    def on_start(self, run: Run) -> None:
        if not run.processes.first:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        if self.console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            )
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=run.config.train.steps, completed=run.step)
            self.bar.start()

    def on_step(self, run: Run) -> None:
        if self.console is None:
            return
        self.seconds.append(run.record["step_seconds"])
        text = self.line(run)
        if self.bar is not None:
            self.bar.update(self.task, completed=run.step, description=text)
        elif run.step % self.every == 0 or run.last:
            self.console.print(f"step {run.step:>{len(str(run.config.train.steps))}}/{run.config.train.steps}  {text}")

    def line(self, run: Run) -> str:
        record = run.record
        mean = sum(self.seconds) / len(self.seconds)
        left = timedelta(seconds=round(mean * (run.config.train.steps - run.step)))
        tokens = record["tokens_per_second"] * record["step_seconds"] / mean
        parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"grad {record['grad_norm']:.2f}"]
        parts += [f"{human(tokens)} tok/s", f"MFU {percent(record['mfu'])}/{percent(record['mfu_measured'])}"]
        parts += [f"{record['memory_bytes'] / 2**30:.1f} GiB", f"ETA {left}"]
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """A line above the bar, on the talking rank only."""
        if self.console is not None:
            self.console.print(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
