"""Tensors of which ranks hold parts, put together again: for comparing, never for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import boxes, cuts, local
from parallel.share import Share
from parallel.state import named_parameters

Blocks = list[tuple[tuple[int, ...], Tensor]]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by its parameter's name, as this rank's share of the whole one."""
    table = cuts(model)
    return {
        name: Share.of(parameter.grad, table.get(name, ()), name)
        for name, parameter in named_parameters(model)
        if parameter.grad is not None
    }


def assemble(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(whole tensors on the CPU, name -> how far ranks that hold the same block differ). Collective over the job."""
    own = {name: (tuple(tensor.shape), _blocks(tensor)) for name, tensor in tensors.items()}
    found: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
    whole: dict[str, Tensor] = {}
    spread: dict[str, float] = {}
    for name in dict.fromkeys(name for rank in found for name in rank):
        parts = [rank[name] for rank in found if name in rank]
        tensor = torch.full(parts[0][0], torch.nan, dtype=parts[0][1][0][1].dtype)
        differs = 0.0
        for offsets, block in (block for _, blocks in parts for block in blocks):
            place = tuple(slice(start, start + size) for start, size in zip(offsets, block.shape))
            known = ~tensor[place].isnan()
            if known.any():
                differs = max(differs, float((tensor[place] - block)[known].abs().max()))
            tensor[place] = block
        whole[name], spread[name] = tensor, differs
    return whole, spread


def _blocks(tensor: Tensor) -> Blocks:
    own, each = (tensor.held, tensor.cuts) if isinstance(tensor, Share) else (tensor, ())
    return [(box.whole, box.of(local(own)).detach().cpu().clone()) for box in boxes(own, each)]
