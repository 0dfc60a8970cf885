"""What the training loop asks of a data-parallel engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.ranges import named


class MicroBatch(Protocol):
    """One packed row: tokens and targets int64 [1, T] (-100: no target), cu_seqlens int32 [N + 1]."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor: ...


Veto = Callable[[float], bool] | None
"""The global gradient norm -> whether the update is called off."""


class Engine(ABC):
    """Owns the model and the optimizer of this rank.

    One step of the loop: `engine.forward_backward(batches, targets)`, then `engine.step(lr)`.
    """

    model: nn.Module
    """The bare model: named parameters, routers, caches. Call the engine, not this, to compute."""

    cut: Callable[[Any], Any] = staticmethod(lambda batch: batch)
    """A micro-batch -> this rank's part of it, where a row is spread over ranks (context parallelism)."""

    def forward_backward(
        self,
        batches: Sequence[MicroBatch],
        denominator: float,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Adds the gradients of the summed losses of a step's micro-batches, divided by `denominator`.

        context: entered around every forward pass (autocast). Returns this rank's share of that sum, fp64.
        """
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for index, whole in enumerate(batches):
            batch = self.cut(whole)
            with context(), named("forward"):
                loss = self(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens) / denominator
            with named("backward"):
                self.backward(loss, last=index == len(batches) - 1)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """This rank's share of the summed loss of one micro-batch, fp32 or fp64."""
        batch = self.cut(batch)
        return self(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`. The gradients of all ranks are summed, not averaged: give each rank's share of the
        global loss. last: the step's final micro-batch, after which the engine may communicate."""

    @abstractmethod
    def step(self, lr: float, veto: Veto = None) -> float:
        """Clips, updates with this learning rate and clears the gradients.

        Returns the global gradient norm before clipping, the same number on every rank. When it is not finite, nothing is
        updated, on any rank. veto: asked on every rank, with a norm that is finite, before anything is updated; if it says True,
        on all ranks alike, the gradients are dropped and parameters and optimizer stay as they are.
        """

    def watch(self) -> bool:
        """From now on keeps what `evidence` tells. Returns whether it can."""
        return False

    def evidence(self) -> bytes:
        """What this rank alone computed in the latest step, before its gradients were summed with other ranks', to be compared
        with the same step computed again. Nothing where an engine's gradients are never seen apart."""
        return b""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Model and optimizer by name: `model/<name>` and `optimizer/<parameter>/<key>`, the same names and global shapes
        whatever the engine and the number of ranks. Collective."""

    def replicated(self) -> dict[str, Tensor]:
        """By name, all that may be on several ranks and must be the same on them (see parallel/replicas.py). Collective."""
        return self.state_tensors()

    @abstractmethod
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave (filled with a checkpoint's content). Collective."""
