"""The `faults` section of a run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from parallel.config import Strict


class FaultsConfig(Strict):
    spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    """What follows a loss or gradient far above its recent values. warn: a line in events.jsonl. skip: no update. rollback: go
    back to a checkpoint and jump over the data since."""
    not_finite: Literal["skip", "rollback"] = "skip"
    """What follows a loss or gradient that is not finite. There is no update in any case."""
    window: int = Field(128, ge=2)
    """Latest steps that "recent" means."""
    history: int = Field(64, ge=2)
    """Steps that must be in the window before anything counts as a spike."""
    loss_factor: float = Field(6.0, gt=0)
    """A loss is a spike when it lies this many standard deviations above the window's median."""
    loss_floor: float = Field(0.01, gt=0)
    """One standard deviation is at least this share of the median: losses that hardly vary would make a spike of anything."""
    norm_factor: float | None = Field(10.0, gt=1)
    """A gradient is a spike when its norm is this many times the window's median; null: its size does not matter."""
    rewind: int = Field(100, ge=1)
    """Rollback: the checkpoint to go back to is at least this many steps older than the fault. See checkpoint.every and keep."""
    rollbacks: int = Field(3, ge=0)
    """Rollbacks of a run; at the next one it ends with exit code 79."""
    replay: bool = True
    """Compute a faulty step again first, from the same state: if it turns out good, the hardware was at fault, not the data."""
    transient_limit: int = Field(3, ge=1)
    """Faults of the hardware, each gone at the replay, that one rank may have before the run ends with exit code 79."""
    replica_check_every: int | None = Field(100, ge=1)
    """Steps between comparisons of what several ranks hold copies of; also before each save. null: never."""

    @field_validator("spike", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads `off` as false

    @model_validator(mode="after")
    def _history_fits(self) -> Self:
        if self.history > self.window:
            raise ValueError(f"history={self.history} is more than window={self.window}; make it at most that")
        return self
