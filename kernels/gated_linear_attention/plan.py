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
class Segment:
    """A run of chunks [first, last) of the list.

    sizes: chunks in each of its pieces, in list order; a piece holds chunks of one scan step.
    sequences: the first sorted sequence of each piece; the others follow.
    rectangle: (row, rows, token, tokens) if these are whole chunks of a dense batch, rows varying fastest; else None.
    slots: int64 [m, C], the chunks' tokens; padding: bool [m, C], where a slot holds none, or None if all hold one.
    """

    first: int
    last: int
    sizes: list[int]
    sequences: list[int]
    shape: tuple[int, int, int]  # B, T, C
    rectangle: tuple[int, int, int, int] | None
    slots: Tensor
    padding: Tensor | None

    def rows(self, heads: int) -> slice:
        """The segment's place in tensors whose first dim is chunks times heads."""
        return slice(self.first * heads, self.last * heads)

    def states(self, states: Tensor) -> list[Tensor]:
        """The pieces' views of sorted states [N, ...], in list order."""
        return [states[n : n + size] for n, size in zip(self.sequences, self.sizes)]

    def _window(self, x: Tensor, group: int) -> Tensor:
        """[tokens (+ 1), heads, ...] -> the rectangle's view [steps, rows, heads / group, C, group, ...]."""
        assert self.rectangle is not None
        B, T, C = self.shape
        row, rows, token, tokens = self.rectangle
        x = x[: B * T].unflatten(0, (B, T))[row : row + rows, token : token + tokens]
        x = x.unflatten(2, (-1, group)).unflatten(1, (-1, C))
        return x.permute(1, 0, 3, 2, *range(4, x.dim()))

    def _places(self, heads: int, group: int) -> Tensor:
        """Places in [tokens * heads, ...] in the order that `fetch` gives: int64 [m * heads * C]."""
        head = torch.arange(heads, device=self.slots.device).view(-1, 1, group)
        return (self.slots[:, None, :, None] * heads + head).flatten()

    def fetch(
        self, x: Tensor, group: int = 1, factor: Tensor | float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [tokens, heads, ...] -> a new [m * heads / group, C, group * ...], zero where there is no token.

        Multiplied by `factor` [m * heads / group, C, group] or a number on the way: copying alone takes as long.
        """
        rest, C = x.shape[2:], self.shape[2]
        m = self.last - self.first
        out = x.new_empty(m, x.shape[1] // group, C, group, *rest, dtype=dtype or x.dtype)
        if self.rectangle is not None:
            source = self._window(x, group)
        else:
            flat = x.reshape(-1, *rest)
            taken = flat.index_select(0, self._places(x.shape[1], group).clamp_(max=flat.shape[0] - 1)).view(out.shape)
            if self.padding is not None:
                taken.masked_fill_(self.padding.view(m, 1, C, 1, *(1 for _ in rest)), 0)
            source = taken
        _times(source, factor, out.view(source.shape))
        return out.view(-1, C, *rest) if group == 1 else out.view(-1, C, group * rest[0], *rest[1:])

    def put(self, x: Tensor, values: Tensor, group: int = 1, factor: Tensor | float | None = None) -> None:
        """The inverse of fetch, times factor. x [tokens + 1, heads, ...]: slots without a token write to the last place."""
        if self.rectangle is not None:
            window = self._window(x, group)
            _times(values.view(window.shape), factor, window)
        else:
            places, rest = self._places(x.shape[1], group), x.shape[2:]
            values = values.view(self.last - self.first, -1, self.shape[2], group, *rest)
            made = torch.empty_like(values, dtype=x.dtype)
            _times(values, factor, made)
            x.view(-1, *rest).index_copy_(0, places, made.view(-1, *rest))


def _times(x: Tensor, factor: Tensor | float | None, out: Tensor) -> None:
    """out = x times a factor for each row of x's last dim; the tensors may differ in dtype."""
    if factor is None:
        out.copy_(x)
    elif isinstance(factor, float):
        torch.mul(x, factor, out=out)
    else:
        torch.mul(x, factor.view(*x.shape[:-1], 1), out=out)


@dataclass(frozen=True)
class Plan:
    """The list of chunks of one call.

    steps: (first chunk, last chunk + 1) of each step of the scan; a step of n chunks concerns the first n sorted sequences.
    slots: int64 [M, C], the flat token (row * T + t) of each slot; B * T where there is none.
    order: int64 [N], the sequence behind each sorted one, or None where they are not reordered (a dense batch).
    """

    B: int
    T: int
    C: int
    sequences: int
    steps: list[tuple[int, int]]
    slots: Tensor
    order: Tensor | None

    @property
    def chunks(self) -> int:
        return self.slots.shape[0]

    def segments(self, size: int) -> list[Segment]:
        """The list in runs of at most `size` chunks, in the order of the scan."""
        runs = self._dense_runs(size) if self.order is None else self._packed_runs(size)
        segments = []
        for first, last, rectangle in runs:
            pieces = [(max(a, first), min(b, last), a) for a, b in self.steps if a < last and b > first]
            slots = self.slots[first:last]
            padding = slots == self.B * self.T if rectangle is None else None
            segments.append(
                Segment(
                    first=first,
                    last=last,
                    sizes=[b - a for a, b, _ in pieces],
                    sequences=[a - start for a, _, start in pieces],
                    shape=(self.B, self.T, self.C),
                    rectangle=rectangle,
                    slots=slots,
                    padding=padding,
                )
            )
        return segments

    def _packed_runs(self, size: int) -> Iterator[tuple[int, int, None]]:
        for first in range(0, self.chunks, size):
            yield first, min(first + size, self.chunks), None

    def _dense_runs(self, size: int) -> Iterator[tuple[int, int, tuple[int, int, int, int] | None]]:
        """Rectangles of rows and steps; the last, partly filled step stays apart so that all others are whole."""
        whole = self.T // self.C
        if size >= self.B:
            stride = size // self.B
            for step in range(0, whole, stride):
                end = min(step + stride, whole)
                yield step * self.B, end * self.B, (0, self.B, step * self.C, (end - step) * self.C)
        else:
            for step in range(whole):
                for row in range(0, self.B, size):
                    end = min(row + size, self.B)
                    yield step * self.B + row, step * self.B + end, (row, end - row, step * self.C, self.C)
        for first in range(whole * self.B, self.chunks, size):
            yield first, min(first + size, self.chunks), None

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
        return Plan(B, T, C, B, steps, slots, None)
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
    return Plan(B, T, C, len(lengths), steps, slots.to(device), order.to(device))
