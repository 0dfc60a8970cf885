"""What the ranks of test_collectives.py do: imported by forked processes, so without pytest."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def through(rank: int, world: int, name: str, shape: tuple[int, ...], dim: int | None) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input) where each rank's loss weighs the output by numbers of its own."""
    group = dist.new_group(list(range(world)))
    x = part(rank, shape).requires_grad_()
    function = getattr(collectives, name)
    y = function(x, group) if dim is None else function(x, dim, group)
    (y * part(100 + rank, tuple(y.shape))).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def swapped(rank: int, world: int, counts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """counts[i][j]: rows that rank i sends to rank j."""
    send, receive = counts[rank], [row[rank] for row in counts]
    x = part(rank, (sum(send), 2)).requires_grad_()
    y = collectives.all_to_all(x, send, receive, dist.group.WORLD)
    (y * part(100 + rank, tuple(y.shape))).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def used_by_one(rank: int, world: int) -> Tensor:
    """Only rank 0 uses what was gathered; all ranks' backward passes must come to an end all the same."""
    kept, sent = part(rank, (3,)).requires_grad_(), part(10 + rank, (1, 2)).requires_grad_()
    through, all_sent = collectives.beside(kept, sent, dist.group.WORLD)
    loss = through.sum() * 2.0
    if rank == 0:
        loss = loss + (all_sent * torch.arange(1.0, 2.0 * world + 1.0, dtype=torch.float64).view(world, 2)).sum()
    loss.backward()
    assert kept.grad is not None and torch.equal(kept.grad, torch.full((3,), 2.0, dtype=torch.float64))
    assert sent.grad is not None
    return sent.grad


def every_dtype(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Sums and joins of small whole numbers, exact in every dtype."""
    group, out = dist.group.WORLD, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32):
        x = (torch.arange(4) + 10 * rank).to(dtype).view(4, 1)
        out[str(dtype)] = [
            collectives.gathered(x, 1, group),
            collectives.scattered(x, 0, group),
            collectives.summed(x, group),
            collectives.exchanged(x, [1, 3], [1, 1] if rank == 0 else [3, 3], group),
        ]
    return out


def refusals(rank: int, world: int) -> list[str]:
    texts = []
    x = torch.zeros(3, 2, requires_grad=True)
    for call in (
        lambda: collectives.reduce_scatter(x, 0, dist.group.WORLD),
        lambda: collectives.all_to_all(x, [1, 1], [1, 1], dist.group.WORLD),
    ):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    return texts
