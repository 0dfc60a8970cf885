"""Where the tokens of a batch, dense or packed, sit in a list of chunks, and how that list is cut in slabs.

Chunks are sorted by their place in the sequence first and by sequence second, and sequences by falling length. So the
chunks that the state scan meets at one step are neighbours, and so are the states of the sequences still running.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packing import sequence_bounds

# Chunks times heads worked on at once on CPU: at K = 128 an operand of a slab is 0.5 MiB, so a few stay in the L2 cache,
# and temporary memory does not grow with T. Times from 8 to 32 measured within 10% of each other; 64 is slower.
SLAB = 16
# Slabs start from a stored state. Fewer steps than this would store more states than the operands weigh.
LEAST_STEPS = 4


@dataclass(frozen=True)
class Slab:
    """A run of steps of the scan.

    sizes: chunks (= running sequences) of each step.
    chunks: their place in the list of chunks.
    first, last: token range of a dense batch, [first, last) in every row.
    tokens, places: int64, the tokens of a packed batch and their places in the slab, flattened over [chunk, C].
    """

    B: int
    C: int
    sizes: list[int]
    chunks: slice
    first: int
    last: int
    tokens: Tensor | None
    places: Tensor | None

    def rows(self, heads: int) -> slice:
        """The slab's place in tensors whose first dim is chunks times heads."""
        return slice(self.chunks.start * heads, self.chunks.stop * heads)

    def split(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        """x [chunks · heads, ...] -> one tensor a step."""
        return x.split([n * heads for n in self.sizes])

    def pack(self, x: Tensor, out: Tensor) -> Tensor:
        """Copies the slab's tokens of x [B, T, H, ...] into out [chunks, H, C, ...]; places without a token become 0."""
        by_token = out.transpose(1, 2)  # [chunks, C, H, ...]
        if self.tokens is not None:
            assert self.places is not None
            flat = x.new_zeros(by_token.shape[0] * self.C, *x.shape[2:])
            by_token.copy_(flat.index_copy_(0, self.places, x[0].index_select(0, self.tokens)).view(by_token.shape))
            return out
        by_row = by_token.unflatten(0, (-1, self.B)).transpose(0, 1)  # [B, steps, C, H, ...]
        whole, left = divmod(self.last - self.first, self.C)
        middle = self.first + whole * self.C
        by_row[:, :whole].copy_(x[:, self.first : middle].unflatten(1, (whole, self.C)))
        if left:
            by_row[:, whole, :left].copy_(x[:, middle : self.last])
            by_row[:, whole, left:].zero_()
        return out

    def unpack(self, x: Tensor, out: Tensor) -> None:
        """Copies x [chunks, H, C, ...] to the slab's tokens of out [B, T, H, ...]."""
        by_token = x.transpose(1, 2)
        if self.tokens is not None:
            assert self.places is not None
            rows = by_token.reshape(-1, *out.shape[2:]).index_select(0, self.places)
            out[0].index_copy_(0, self.tokens, rows.to(out.dtype))
            return
        by_row = by_token.unflatten(0, (-1, self.B)).transpose(0, 1)
        whole, left = divmod(self.last - self.first, self.C)
        middle = self.first + whole * self.C
        out[:, self.first : middle].unflatten(1, (whole, self.C)).copy_(by_row[:, :whole])
        if left:
            out[:, middle : self.last].copy_(by_row[:, whole, :left])


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of one call. N sequences in `chunks` chunks of C tokens.

    order: int64 [N], the sequence behind each row of the sorted states, or None where they keep their order.
    """

    N: int
    C: int
    chunks: int
    slabs: list[Slab]
    order: Tensor | None = None

    def sort_states(self, states: Tensor) -> Tensor:
        """[N, ...] by sequence -> by falling length."""
        return states if self.order is None else states.index_select(0, self.order)

    def unsort_states(self, states: Tensor) -> Tensor:
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(0, self.order, states)


def chunk_layout(q: Tensor, cu_seqlens: Tensor | None, heads: int, C: int) -> ChunkLayout:
    """The layout of q's tokens ([B, T, ...], packed when cu_seqlens is given) in chunks of C, for so many value heads."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        sizes = [B] * -(-T // C)
        slabs = [
            Slab(B, C, sizes[s:e], slice(s * B, e * B), s * C, min(e * C, T), None, None)
            for s, e in _cut(sizes, heads, q.device)
        ]
        return ChunkLayout(B, C, len(sizes) * B, slabs)

    starts, ends = torch.tensor([bounds[1:] for bounds in sequence_bounds(cu_seqlens, B, T)]).unbind(1)
    lengths = ends - starts
    N = lengths.numel()
    order = torch.argsort(lengths, descending=True, stable=True)
    steps = -(-int(lengths.max()) // C)
    running = (lengths[order][None] > C * torch.arange(steps)[:, None]).sum(1)
    before = torch.cat([running.new_zeros(1), running.cumsum(0)])  # chunks before each step
    rank = torch.empty_like(order)
    rank[order] = torch.arange(N)
    inside = torch.arange(T) - torch.repeat_interleave(starts, lengths)
    places = (before[inside // C] + torch.repeat_interleave(rank, lengths)) * C + inside % C
    tokens = torch.argsort(places)
    places = places[tokens]
    sizes = running.tolist()
    slabs = []
    for s, e in _cut(sizes, heads, q.device):
        a, b = int(before[s]), int(before[e])
        i, j = torch.searchsorted(places, torch.tensor([a * C, b * C])).tolist()
        here = (tokens[i:j].to(q.device), (places[i:j] - a * C).to(q.device))
        slabs.append(Slab(B, C, sizes[s:e], slice(a, b), 0, 0, *here))
    return ChunkLayout(N, C, int(before[-1]), slabs, order.to(q.device))


def _cut(sizes: list[int], heads: int, device: torch.device) -> list[tuple[int, int]]:
    """Cuts the steps, given the chunks of each, into slabs [(first step, last step + 1)]."""
    if device.type != "cpu":  # an accelerator wants all the work at once
        return [(0, len(sizes))]
    cuts, start, held = [], 0, 0
    for t, n in enumerate(sizes):
        if t - start >= LEAST_STEPS and (held + n) * heads > SLAB:
            cuts.append((start, t))
            start, held = t, 0
        held += n
    return [*cuts, (start, len(sizes))]
