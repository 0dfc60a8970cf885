"""What the training loop asks of a data-parallel engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Engine(ABC):
    """Owns the model and the optimizer of this rank.

    One step of the loop: for each micro-batch `loss = engine(...)`, `engine.backward(loss, last=...)`, then `engine.step(lr)`.
    """

    model: nn.Module
    """The bare model: named parameters, routers, caches. Call the engine, not this, to compute."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`. The gradients of all ranks are summed, not averaged: give each rank's share of the
        global loss. last: the step's final micro-batch, after which the engine may communicate."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clips, updates with this learning rate and clears the gradients.

        Returns the global gradient norm before clipping, the same number on every rank. When it is not finite, nothing is
        updated, on any rank.
        """

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Model and optimizer by name: `model/<name>` and `optimizer/<parameter>/<key>`, the same names and global shapes
        whatever the engine and the number of ranks. Collective."""

    @abstractmethod
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave (filled with a checkpoint's content). Collective."""
