"""AdamW for the parameters that another optimizer leaves to it: torch's fused kernel on this rank's own shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.layout import local


class AdamPart(NamedTuple):
    beta1: float
    beta2: float
    eps: float

    def state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What it keeps of a parameter, under torch's names; zero."""
        parameter = parameter.detach()
        return {
            "step": torch.zeros((), device=parameter.device),  # where the fused kernel wants it
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def step(self, parameters: Sequence[Tensor], state: Mapping[Any, Any], lr: float, weight_decay: float) -> None:
        """One step for those that have a gradient."""
        present = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in present:
            if local(parameter.detach()).numel() == 0:  # this rank has no part of it, but counts steps as the others do
                state[parameter]["step"] += 1
        present = [(parameter, gradient) for parameter, gradient in present if local(parameter.detach()).numel()]
        if not present:
            return
        kept = [state[parameter] for parameter, _ in present]
        adamw(
            [local(parameter.detach()) for parameter, _ in present],
            [local(gradient) for _, gradient in present],
            [local(each["exp_avg"]) for each in kept],
            [local(each["exp_avg_sq"]) for each in kept],
            [],
            [each["step"] for each in kept],
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
