"""metrics.jsonl, one object a step, and TensorBoard. A resumed run first drops the lines that its checkpoint does not know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from pretrain.train.callback import Callback, Run

FILE = "metrics.jsonl"


class Metrics(Callback):
    def __init__(self, tensorboard: bool):
        self.use_tensorboard = tensorboard
        self.file: TextIO | None = None
        self.writer: Any = None

    def on_start(self, run: Run) -> None:
        if not run.processes.first:
            return
        path = run.folder / FILE
        keep_until(path, run.step)
        self.file = path.open("a", buffering=1)  # line buffered: a killed job keeps its last line
        if self.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def on_step(self, run: Run) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(finite(run.record), allow_nan=False) + "\n")
        if self.writer is not None:
            for key, value in run.record.items():
                if isinstance(value, int | float) and key != "step":
                    self.writer.add_scalar(key, value, run.step)

    def on_rewind(self, run: Run) -> None:
        self.close()
        self.on_start(run)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: a value that is not finite becomes null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step` (and a torn last line): steps that will be done again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file; a torn last line, as a killed job leaves it, is passed over."""
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) != float("inf")]
