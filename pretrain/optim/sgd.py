"""Stochastic gradient descent with momentum, as torch has it: m <- mu m + g + decay w, w <- w - lr m (or lr (g + mu m))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from parallel.config import Strict
from parallel.mesh import Mesh
from pretrain.optim.adamw import by_type, split_by_decay


class SGDConfig(Strict):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    """Peak learning rate; the schedule scales it."""
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    """Added to the gradient, times the weight; of matrices only, as AdamW's."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs momentum; set momentum above 0, or leave nesterov out")
        return self

    def check(self, engine: str) -> None:
        """Raises ValueError for an engine that it does not work under."""
        if engine == "deepspeed":
            raise ValueError(
                "optimizer.kind=sgd: checkpoints of the deepspeed engine hold AdamW's moments; use engine.kind=torch, or "
                "optimizer.kind=adamw"
            )

    def factory(self, model: nn.Module, mesh: Mesh | None = None) -> Callable[[nn.Module], torch.optim.SGD]:
        """What makes the optimizer of this rank's part of `model`, which is still whole."""
        return self.build

    def build(self, model: nn.Module) -> torch.optim.SGD:
        groups = [
            {"params": alike, "weight_decay": decay}
            for parameters, decay in zip(split_by_decay(model), (self.weight_decay, 0.0))
            for alike in by_type(parameters)
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=True)
