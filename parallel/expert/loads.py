"""Loads of experts over all tokens that share a step, whatever ranks they lie on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh


def stage_sum(mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """x -> the sum of x over the ranks of this pipeline stage, the same on all of them; x stays as it is. Collective.

    The ranks of a stage hold different tokens for the same layers: other batches (dp), other parts of the sequences (cp), other
    slices of those (tp).
    """
    group = mesh.group("dp_cp_tp")

    def total(x: Tensor) -> Tensor:
        x = x.clone()
        if group is not None:
            dist.all_reduce(x, group=group)
        return x

    return total


def share_loads(model: nn.Module, mesh: Mesh) -> None:
    """Gives balancing losses the loads of the whole micro-batch, over all ranks that hold a part of it.

    For every module with `reduce_load`. A loss is a sum over this rank's tokens, with the shares of all: the sum over ranks is
    then the loss of one rank with all the tokens, and so is its gradient.
    """
    total = stage_sum(mesh)
    module: Any
    for module in model.modules():
        if hasattr(module, "reduce_load"):
            module.reduce_load = total
