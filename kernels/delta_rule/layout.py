"""Where the tokens of a batch, dense or packed, sit in a list of chunks.

Chunks are sorted by their place in the sequence first and by sequence second, and sequences by falling length. So the
chunks that the state scan meets at one step are neighbours, and so are the states of the sequences that are still
running.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packing import sequence_bounds


@dataclass(frozen=True)
class ChunkLayout:
    """The list of chunks of one call.

    steps: [(first chunk, last chunk + 1)] of each step of the scan; a step of n chunks concerns the first n sequences.
    slots: int64 [T], the place of each packed token in the flattened list, or None for a dense batch.
    order: int64 [N], the sequence behind each row of the sorted states, or None where they are not reordered.
    """

    B: int
    T: int
    N: int
    C: int
    steps: list[tuple[int, int]]
    slots: Tensor | None = None
    order: Tensor | None = None

    @property
    def chunks(self) -> int:
        return self.steps[-1][1]

    def pack(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [B, T, H, ...] -> [M, H, C, ...], M chunks; places without a token are zero. Converts to out's dtype."""
        H, rest = x.shape[2], x.shape[3:]
        if out is None:
            out = x.new_empty(self.chunks, H, self.C, *rest)
        by_token = out.transpose(1, 2)  # [M, C, H, ...]
        if self.slots is not None:
            flat = x.new_zeros(self.chunks * self.C, H, *rest)
            flat.index_copy_(0, self.slots, x[0])
            by_token.copy_(flat.view(self.chunks, self.C, H, *rest))
            return out
        whole, left = divmod(self.T, self.C)
        by_row = by_token.unflatten(0, (-1, self.B))  # [T / C, B, C, H, ...]
        by_row[:whole].copy_(x[:, : whole * self.C].unflatten(1, (whole, self.C)).transpose(0, 1))
        if left:
            by_row[whole, :, :left].copy_(x[:, whole * self.C :])
            by_row[whole, :, left:].zero_()
        return out

    def unpack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [M, H, C, ...] -> [B, T, H, ...], the inverse of pack."""
        H, rest = x.shape[1], x.shape[3:]
        out = x.new_empty(self.B, self.T, H, *rest, dtype=dtype)
        by_token = x.transpose(1, 2)
        if self.slots is not None:
            out[0].copy_(by_token.reshape(self.chunks * self.C, H, *rest).index_select(0, self.slots))
            return out
        whole, left = divmod(self.T, self.C)
        by_row = by_token.unflatten(0, (-1, self.B)).transpose(0, 1)
        out[:, : whole * self.C].unflatten(1, (whole, self.C)).copy_(by_row[:, :whole])
        if left:
            out[:, whole * self.C :].copy_(by_row[:, whole, :left])
        return out

    def sort_states(self, states: Tensor) -> Tensor:
        """[N, ...] by sequence -> by falling length."""
        return states if self.order is None else states.index_select(0, self.order)

    def unsort_states(self, states: Tensor) -> Tensor:
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(0, self.order, states)


def chunk_layout(q: Tensor, cu_seqlens: Tensor | None, C: int) -> ChunkLayout:
    """The layout of q's tokens ([B, T, ...], packed when cu_seqlens is given) in chunks of C."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        steps = [(t * B, (t + 1) * B) for t in range(-(-T // C))]
        return ChunkLayout(B, T, B, C, steps)
    starts, ends = torch.tensor([bounds[1:] for bounds in sequence_bounds(cu_seqlens, B, T)]).unbind(1)
    lengths = ends - starts
    order = torch.argsort(lengths, descending=True, stable=True)
    running = (lengths[order][None] > C * torch.arange(-(-int(lengths.max()) // C))[:, None]).sum(1)
    last = torch.cumsum(running, 0)
    steps = list(zip((last - running).tolist(), last.tolist()))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(lengths.numel())
    place = torch.arange(T) - torch.repeat_interleave(starts, lengths)
    chunk = (last - running)[place // C] + torch.repeat_interleave(rank, lengths)
    slots = (chunk * C + place % C).to(q.device)
    return ChunkLayout(B, T, lengths.numel(), C, steps, slots, order.to(q.device))
