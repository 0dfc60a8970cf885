"""What the ranks of a job hold, put together again on its first rank: for comparing, never for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import boxes, cuts, local
from parallel.processes import Processes
from parallel.share import Share
from parallel.state import named_parameters

Blocks = list[tuple[tuple[int, ...], Tensor]]


class Whole(NamedTuple):
    """A tensor of the whole model on the CPU, NaN where no rank holds it.

    spread: the largest difference between ranks, or copies on one rank, that hold the same elements; 0 only for equal bits.
    """

    tensor: Tensor
    spread: float


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every gradient that there is, by its parameter's name, as this rank's share of the whole one."""
    table = cuts(model)
    for name, parameter in named_parameters(model):
        if parameter.grad is not None:
            yield name, Share.of(parameter.grad, table.get(name, ()), name)


def gathered(value: Any, processes: Processes) -> list[Any]:
    """Every rank's value (any picklable object) on the job's first rank; elsewhere an empty list. Collective."""
    if processes.world == 1:
        return [value]
    found: list[Any] | None = [None] * processes.world if processes.first else None
    dist.gather_object(value, found)
    return found or []


def assemble(tensors: Iterable[tuple[str, Tensor]], processes: Processes) -> dict[str, Whole]:
    """Whole tensors from each rank's named shares, on the job's first rank; elsewhere nothing. Collective.

    A name may come several times: copies that pipeline stages of one rank hold.
    """
    own = [(name, tuple(tensor.shape), _blocks(tensor)) for name, tensor in tensors]
    found: dict[str, Whole] = {}
    known: dict[str, Tensor] = {}
    for name, shape, blocks in (entry for rank in gathered(own, processes) for entry in rank):
        for offsets, block in blocks:
            if name not in found:
                empty = torch.nan if block.is_floating_point() else 0
                found[name] = Whole(torch.full(shape, empty, dtype=block.dtype), 0.0)
                known[name] = torch.zeros(shape, dtype=torch.bool)
            whole, spread = found[name]
            place = tuple(slice(start, start + size) for start, size in zip(offsets, block.shape))
            found[name] = Whole(
                whole, max(spread, _spread(whole[place][known[name][place]], block[known[name][place]]))
            )
            whole[place], known[name][place] = block, True
    return found


def _spread(one: Tensor, other: Tensor) -> float:
    """The largest difference between two tensors of known elements; infinite where one is no number."""
    if torch.equal(one, other):
        return 0.0
    return (one.double() - other.double()).abs().nan_to_num(torch.inf).max().item()


def _blocks(tensor: Tensor) -> Blocks:
    if isinstance(tensor, Share):
        held = [(box.whole, tensor.block(box)) for box in tensor.boxes()]
    else:
        held = [(box.whole, box.of(local(tensor))) for box in boxes(tensor, ())]
    return [(offsets, block.detach().cpu().clone()) for offsets, block in held]
