"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from parallel.config import Strict


class CosineConfig(Strict):
    """Linear warm-up, then half a cosine down to `final` times the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    final: float = Field(0.1, ge=0, le=1)
    """Last learning rate, as a fraction of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of step (counted from 0) of a run of `steps`, as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupStableDecayConfig(Strict):
    """Linear warm-up, a plateau, then a linear decay to `final` times the peak over the last steps (WSD, arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the run's steps that the final decay takes."""
    final: float = Field(0.0, ge=0, le=1)
    """Last learning rate, as a fraction of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of step (counted from 0) of a run of `steps`, as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        length = round(self.decay * steps)
        remaining = steps - step
        if remaining >= length:
            return 1.0
        return self.final + (1.0 - self.final) * max(0, remaining) / length


ScheduleConfig = Annotated[CosineConfig | WarmupStableDecayConfig, Field(discriminator="kind")]
