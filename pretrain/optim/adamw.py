"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh
from pretrain.optim.moments import MomentsConfig

# Tables, taps and rates that happen to have two dims or more: decay would pull them to zero for no reason.
NEVER_DECAYED = ("embedding.weight", ".conv", ".depthwise", ".grouped", ".A_log")


class AdamWConfig(MomentsConfig):
    kind: Literal["adamw"] = "adamw"
    fused: bool | None = None
    """All of the update in one pass over memory, by torch's fused kernel, instead of ten. null: where torch has one for the
    device. The results differ from the other form's in the last bits."""

    def fuses(self, device: str) -> bool:
        """Whether parameters on this type of device (cpu, cuda, meta) are updated by torch's fused kernel."""
        return device in ("cpu", "cuda") if self.fused is None else self.fused

    def check(self, engine: str) -> None:
        """Works under every engine."""

    def factory(self, model: nn.Module, mesh: Mesh | None = None) -> Callable[[nn.Module], torch.optim.AdamW]:
        """What makes the optimizer of this rank's part of `model`, which is still whole."""
        return self.build

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        decayed, others = split_by_decay(model)
        groups = [
            {"params": alike, "weight_decay": decay}
            for parameters, decay in ((decayed, self.weight_decay), (others, 0.0))
            for alike in by_type(parameters)
        ]
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        fused = self.fuses(device)
        # foreach: a kernel launch for many tensors at a time.
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, foreach=not fused, fused=fused
        )


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed). By name and shape, since sharding replaces parameter objects and loses their attributes."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(NEVER_DECAYED)
        (decayed if matrix else others).append(parameter)
    return decayed, others


def by_type(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded and plain parameters apart: no operation takes both in one list."""
    sharded: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (sharded if isinstance(parameter, DTensor) else plain).append(parameter)
    return [alike for alike in (sharded, plain) if alike]
