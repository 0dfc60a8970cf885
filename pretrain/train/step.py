"""One optimizer step: every micro-batch forward and backward, then one update that all ranks agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.engines import Engine
from parallel.processes import Processes
from pretrain.data.loader import Batch


@dataclass(frozen=True)
class StepResult:
    """loss: nats per target over the global batch; grad_norm: global, before clipping; flagged: some rank raised its flag."""

    loss: float
    grad_norm: float
    flagged: bool


def train_step(
    engine: Engine, batches: list[Batch], lr: float, processes: Processes, precision: str, flag: bool = False
) -> StepResult:
    """Every target of the global batch weighs the same, however targets are spread over ranks and micro-batches.

    flag: something this rank wants all ranks to know after the step (a signal); it rides on the loss's reduction.
    """
    device = processes.device
    (targets,) = processes.sum([sum(batch.scored for batch in batches)])
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = engine(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens) / max(1.0, targets)
        engine.backward(loss, last=index == len(batches) - 1)
        total += loss.detach()
    grad_norm = engine.step(lr)
    mean, flags = processes.sum([total.item(), float(flag)])
    return StepResult(mean, grad_norm, flags > 0)
