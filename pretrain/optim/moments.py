"""What the configurations of optimizers with Adam's two moments have in common."""

from __future__ import annotations

from pydantic import Field

from parallel.config import Strict


class MomentsConfig(Strict):
    kind: str
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate; the schedule scales it."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of the gradients' running mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Of the running mean of their squares."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of that mean."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; vectors, convolution taps, decay rates and the embedding never decay."""
