"""Moving rows between the ranks of a group, each with any number of rows: there and, in the opposite sense, back.

A transport pairs two collectives of which each is the adjoint of the other, so the gradient of one is the other:

    exchange   there: all-to-all      back: the reversed all-to-all
    gathering  there: all-gather      back: reduce-scatter (sum)

`there` and `back` launch and return at once; calling what they return waits and gives the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed the two; the old names warn there, the new ones are unknown to 2.11.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Arrival = Callable[[], Tensor]
"""Waits for the message, then gives it. Call it once."""


class Transport(Protocol):
    def there(self, x: Tensor) -> Arrival:
        """x [own rows, ...] -> [rows that this rank works on, ...]."""

    def back(self, x: Tensor) -> Arrival:
        """x [rows that this rank works on, ...] -> [own rows, ...]."""


@dataclass(frozen=True)
class Exchange:
    """send[i]: how many of this rank's rows go to rank i of the group, the first ones to rank 0; receive[i]: how many come."""

    group: ProcessGroup
    send: Sequence[int]
    receive: Sequence[int]

    def there(self, x: Tensor) -> Arrival:
        return self._launch(x, self.send, self.receive)

    def back(self, x: Tensor) -> Arrival:
        return self._launch(x, self.receive, self.send)

    def _launch(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        assert x.shape[0] == sum(send), f"{x.shape[0]} rows to send, {sum(send)} announced"
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, list(receive), list(send), group=self.group, async_op=True)
        return _arrival(work, x, lambda: out)


@dataclass(frozen=True)
class Gathering:
    """counts[i]: rows of rank i of the group. Every rank works on the rows of all, in the order of the ranks.

    Messages have one size, that of the largest: a gathering of unlike sizes sends filling.
    """

    group: ProcessGroup
    counts: Sequence[int]
    rank: int

    def there(self, x: Tensor) -> Arrival:
        assert x.shape[0] == self.counts[self.rank]
        ranks, most = len(self.counts), max(self.counts)
        if most == 0:
            return x.clone  # nobody has any rows
        full = self._filled([x])
        out = x.new_empty(ranks * most, *x.shape[1:])
        work = _all_gather(out, full, group=self.group, async_op=True)
        if min(self.counts) == most:
            return _arrival(work, full, lambda: out)
        parts = [part[:count] for part, count in zip(out.split(most), self.counts)]
        return _arrival(work, full, lambda: torch.cat(parts))

    def back(self, x: Tensor) -> Arrival:
        assert x.shape[0] == sum(self.counts)
        most = max(self.counts)
        if most == 0:
            return x.clone  # nobody has any rows
        full = self._filled(x.split(list(self.counts)))
        out = x.new_empty(most, *x.shape[1:])
        work = _reduce_scatter(out, full, group=self.group, async_op=True)
        return _arrival(work, full, lambda: out[: self.counts[self.rank]])

    def _filled(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts one after another, each brought to the size of the largest with zeros."""
        most = max(self.counts)
        filled: list[Tensor] = []
        for part in parts:
            filled.append(part)
            if part.shape[0] < most:
                filled.append(part.new_zeros(most - part.shape[0], *part.shape[1:]))
        return filled[0].contiguous() if len(filled) == 1 else torch.cat(filled)


def _arrival(work: Any, sent: Tensor, result: Callable[[], Tensor]) -> Arrival:
    kept = [sent]  # must live until the message has left

    def arrive() -> Tensor:
        work.wait()
        kept.clear()
        return result()

    return arrive


def announce(count: int, group: ProcessGroup, device: torch.device) -> list[int]:
    """Every rank's count, in the order of the group. Collective."""
    own = torch.tensor([count], device=device)
    counts = own.new_empty(dist.get_world_size(group))
    _all_gather(counts, own, group=group)
    return counts.tolist()
