"""One optimizer step: every micro-batch forward and backward, then one update that all ranks agree on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from parallel.engines import Engine
from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain.data.loader import Batch


@dataclass(frozen=True)
class StepResult:
    """loss: nats per target over the global batch; grad_norm: global, before clipping; flagged: some rank raised its flag."""

    loss: float
    grad_norm: float
    flagged: bool


def train_step(
    engine: Engine,
    batches: list[Batch],
    lr: float,
    processes: Processes,
    precision: str,
    flag: bool = False,
    mesh: Mesh | None = None,
) -> StepResult:
    """Every target of the global batch weighs the same, however targets are spread over ranks and micro-batches.

    flag: something this rank wants all ranks to know after the step (a signal); it rides on the loss's reduction.
    """
    device = processes.device
    counts = mesh is None or mesh.counts_tokens
    (targets,) = processes.sum([sum(batch.scored for batch in batches) if counts else 0])
    share = engine.forward_backward(
        [batch.to(device) for batch in batches], max(1.0, targets), partial(autocast, device, precision)
    )
    grad_norm = engine.step(lr)
    mean, flags = processes.sum([share.item(), float(flag)])
    return StepResult(mean, grad_norm, flags > 0)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: "bf16" matrix products, or all in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
