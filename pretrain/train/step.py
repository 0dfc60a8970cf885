"""One optimizer step: every micro-batch forward and backward, then one update that all ranks agree on.

What is wrong with a step is decided from the sums over all ranks of loss and gradient, before the optimizer has touched anything:
no rank can decide by itself, and a step that is refused leaves parameters and optimizer as they were. A faulty step is computed a
second time, from the same parameters, batches and random numbers. What is still there then lies in the data or the model; what
has gone was an error of the hardware (the idea of Megatron-LM's rerun state machine).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import nn

from parallel.engines import Engine
from parallel.mesh import Mesh
from parallel.processes import Processes
from parallel.ranges import named
from pretrain.data.loader import Batch
from pretrain.model.router import Balanced
from pretrain.train.streams import random_state, restore_random_state


class Fault(NamedTuple):
    """kind: "not finite" or "spike". refused: the step must not update anything."""

    kind: str
    text: str
    refused: bool


class Judge(Protocol):
    """Says what is wrong with a step, by numbers that are the same on all ranks. replay: compute a faulty one again."""

    replay: bool

    def __call__(self, loss: float, grad_norm: float) -> Fault | None: ...


@dataclass(frozen=True)
class StepResult:
    """loss: nats per target over the global batch; grad_norm: global, before clipping; flagged: some rank raised its flag.

    updated: whether the optimizer made its step. After a replay these numbers are the replay's; first: those of the first
    computation; changed: the ranks whose own part of it came out differently.
    """

    loss: float
    grad_norm: float
    flagged: bool
    fault: Fault | None = None
    first: StepResult | None = None
    changed: tuple[int, ...] = ()

    @property
    def updated(self) -> bool:
        return self.fault is None or not self.fault.refused


def train_step(
    engine: Engine,
    batches: list[Batch],
    lr: float,
    processes: Processes,
    precision: str,
    judge: Judge,
    flag: bool = False,
    mesh: Mesh | None = None,
) -> StepResult:
    """Every target of the global batch weighs the same, however targets are spread over ranks and micro-batches.

    flag: something this rank wants all ranks to know after the step (a signal); it rides on the loss's reduction.
    """
    device = processes.device
    counts = mesh is None or mesh.counts_tokens
    (targets,) = processes.sum([sum(batch.scored for batch in batches) if counts else 0])
    own: list[bytes] = []  # of each computation: what this rank alone came to

    def compute(last: bool) -> StepResult:
        share = engine.forward_backward(
            [batch.to(device) for batch in batches], max(1.0, targets), partial(autocast, device, precision)
        )
        # Summed now and read when the norm is there too: the device is waited for once.
        sums = processes.sum_(torch.stack((share, torch.full_like(share, float(flag)))))
        fault: Fault | None = None

        def veto(norm: float) -> bool:
            nonlocal fault
            fault = judge(sums[0].item(), norm)
            return fault is not None and (fault.refused or not last)

        with named("optimizer"):
            norm = engine.step(lr, veto)
        loss, flags = sums.tolist()
        if not math.isfinite(norm):
            fault = judge(loss, norm)
        if fault is not None or own:
            alone = repr(norm).encode() if processes.world == 1 else b""  # then the norm is this rank's own as well
            own.append(share.cpu().numpy().tobytes() + engine.evidence() + alone)
        return StepResult(loss, norm, flags > 0, fault)

    again = _remember(engine.model, device) if judge.replay else None
    result = compute(last=again is None)
    if result.fault is None or again is None:
        return result
    again()
    second = compute(last=True)
    differs = own[0] != own[1]
    marks = processes.sum([float(differs and rank == processes.rank) for rank in range(processes.world)])
    return replace(second, first=result, changed=tuple(rank for rank, mark in enumerate(marks) if mark))


def _remember(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Call what it returns to be where the step began, but for the gradients, which the engine has dropped."""
    random = random_state(device)

    def again() -> None:
        restore_random_state(random)
        forget_loads(model)

    return again


def forget_loads(model: nn.Module) -> None:
    """Takes back what routers have counted since the last update: those tokens will be counted again, or never were."""
    for module in model.modules():
        if isinstance(module, Balanced):
            module.load.zero_()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: "bf16" matrix products, or all in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
