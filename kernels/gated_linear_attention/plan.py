"""Where the tokens of a batch, dense or packed, lie in a list of chunks, and how they are fetched and put back.

Chunks never straddle sequences. The list is sorted by place in the sequence first and by sequence second, and sequences by
falling length: the chunks that one step of the state scan meets are neighbours, and so are the states of the sequences that
are still running. The list is worked through in segments small enough that a segment's tensors stay in the cache; every
temporary is then memory that was used a moment ago, and peak memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Chunks [first, last) of a segment, which continue the sorted sequences [sequence, sequence + last - first)."""

    first: int
    last: int
    sequence: int

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.last)

    @property
    def sequences(self) -> slice:
        return slice(self.sequence, self.sequence + self.last - self.first)


@dataclass(frozen=True)
class Segment:
    """Chunks [first, last) of the list, and their pieces in the order of the scan. slots int64 [m, C]: the chunks' tokens."""

    first: int
    last: int
    pieces: list[Piece]
    slots: Tensor
    padding: Tensor | None  # bool [m, C], where a slot holds no token; None if all hold one

    def rows(self, heads: int) -> Tensor:
        """Rows of a [tokens * heads, ...] tensor: int64 [m, heads, C]."""
        head = torch.arange(heads, device=self.slots.device)
        return self.slots[:, None] * heads + head[:, None]

    def fetch(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [tokens * heads, D] -> [m, heads, C, D], zero where there is no token."""
        if self.padding is None:
            return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
        taken = x.index_select(0, rows.clamp(max=x.shape[0] - 1).flatten()).view(*rows.shape, *x.shape[1:])
        hole = self.padding[:, None] if x.dim() == 1 else self.padding[:, None, :, None]
        return taken.masked_fill_(hole, 0)

    @staticmethod
    def put(x: Tensor, rows: Tensor, values: Tensor) -> None:
        """The inverse of fetch. x [(tokens + 1) * heads, D]: slots without a token write behind the last one."""
        x.index_copy_(0, rows.flatten(), values.reshape(-1, *x.shape[1:]).to(x.dtype))


@dataclass(frozen=True)
class Plan:
    """The list of chunks of one call.

    steps: (first chunk, last chunk + 1) of each step of the scan; a step of n chunks concerns the first n sorted sequences.
    slots: int64 [M, C], the flat token (row * T + t) of each slot; B * T where there is none.
    order: int64 [N], the sequence behind each sorted one, or None where they are not reordered.
    """

    tokens: int
    sequences: int
    C: int
    steps: list[tuple[int, int]]
    slots: Tensor
    padded: bool
    order: Tensor | None

    @property
    def chunks(self) -> int:
        return self.slots.shape[0]

    def segments(self, size: int, *, reverse: bool = False) -> Iterator[Segment]:
        """The list in runs of at most `size` chunks; pieces and segments in the order of the scan, or against it."""
        starts = range(0, self.chunks, size)
        for first in reversed(starts) if reverse else starts:
            last = min(first + size, self.chunks)
            pieces = [
                Piece(max(a, first) - first, min(b, last) - first, max(a, first) - a)
                for a, b in self.steps
                if a < last and b > first
            ]
            slots = self.slots[first:last]
            padding = slots == self.tokens if self.padded else None
            if padding is not None and not padding.any():
                padding = None
            yield Segment(first, last, pieces[::-1] if reverse else pieces, slots, padding)

    def sort(self, states: Tensor) -> Tensor:
        """[N, ...] by sequence -> sorted."""
        return states if self.order is None else states.index_select(0, self.order)

    def unsort(self, states: Tensor) -> Tensor:
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


def make_plan(B: int, T: int, C: int, cu_seqlens: Tensor | None, device: torch.device) -> Plan:
    """The chunk list of B rows of T tokens, or of the sequences that cu_seqlens (int [N+1]) cuts from one row."""
    if cu_seqlens is None:
        count = -(-T // C)
        place = torch.arange(count * C, device=device).view(count, 1, C)
        slots = place + T * torch.arange(B, device=device)[:, None]
        slots = slots.masked_fill_(place >= T, B * T).view(count * B, C)
        steps = [(t * B, (t + 1) * B) for t in range(count)]
        return Plan(B * T, B, C, steps, slots, T % C != 0, None)
    bounds = cu_seqlens.cpu().long()
    lengths = bounds.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    counts = (lengths[order] + C - 1) // C
    running = (counts[None] > torch.arange(int(counts[0]))[:, None]).sum(1)  # sequences alive at each step
    last = running.cumsum(0)
    steps = list(zip((last - running).tolist(), last.tolist()))
    step = torch.repeat_interleave(torch.arange(len(steps)), running)
    sequence = torch.arange(len(step)) - (last - running)[step]
    place = step[:, None] * C + torch.arange(C)
    slots = bounds[order][sequence][:, None] + place
    slots = torch.where(place < lengths[order][sequence][:, None], slots, T)
    return Plan(T, len(lengths), C, steps, slots.to(device), bool((lengths % C != 0).any()), order.to(device))
