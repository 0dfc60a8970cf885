"""The seam at which a feature joins the training loop: one small file a callback, any of these hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.train.faults.state import FaultState

if TYPE_CHECKING:
    from parallel.engines import Engine
    from parallel.processes import Processes
    from pretrain.config import RunConfig
    from pretrain.model.decoder import Decoder
    from pretrain.model.stage import Stages


@dataclass
class Run:
    """What every callback may see. `step` counts finished steps; `record` is the newest line of metrics."""

    config: RunConfig
    processes: Processes
    engine: Engine
    model: Decoder | Stages
    """This rank's part of the model."""
    step: int = 0
    tokens: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    stop: str | None = None
    """Set to a reason to end the run after this step."""
    broken: bool = False
    """An error that the ranks did not agree on ends the run: others may not answer any more."""
    faults: FaultState = field(default_factory=FaultState)
    """What decisions about faulty steps go by, besides the step."""

    @property
    def folder(self) -> Path:
        return self.config.run

    @property
    def last(self) -> bool:
        return self.step >= self.config.train.steps or self.stop is not None


class Callback:
    """Hooks are called on every rank, in the same order, so that a callback may communicate."""

    phase = "log"
    """What a profile calls the time of `on_step`."""

    def on_start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step(self, run: Run) -> None:
        """After a step; run.record holds its metrics."""

    def on_rewind(self, run: Run) -> None:
        """After the run went back to an earlier checkpoint; run.step is that one's. What was kept of later steps must go."""

    def on_end(self, run: Run) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always, also after an error: release files and threads."""
