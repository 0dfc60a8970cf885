"""Where the tokens of a batch, dense or packed, sit in a list of chunks, and how that list is cut in slabs.

Chunks are sorted by their place in the sequence first and by sequence second, and sequences by falling length. So the
chunks that the state scan meets at one step are neighbours, and so are the states of the sequences still running.

Tokens are copied by pieces, chunks at regular distances in both places: one piece a slab where all sequences are equally
long, a few where they are not. Lists of single tokens took three passes over every tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packing import sequence_bounds

LARGEST = 4  # times its usual size, a slab's where many sequences are short and few are long


class Piece(NamedTuple):
    """[sequences, steps] chunks of `length` tokens each.

    token: the first, in rows laid end to end; apart: tokens from one sequence to the next; the steps are C tokens apart.
    chunk: the first one's place in the slab; stride: chunks from one step to the next; sequences are neighbours.
    """

    sequences: int
    steps: int
    length: int
    token: int
    apart: int
    chunk: int
    stride: int


class Run(NamedTuple):
    """Sequences of one length, neighbours in the order of the layout, whose starts are equally far apart."""

    rank: int
    sequences: int
    start: int
    apart: int
    length: int


@dataclass(frozen=True)
class Slab:
    """A run of steps of the scan.

    sizes: chunks (= running sequences) of each step.
    chunks: their place in the list of chunks.
    pieces: where their tokens come from.
    """

    C: int
    sizes: list[int]
    chunks: slice
    pieces: list[Piece]

    def rows(self, heads: int) -> slice:
        """The slab's place in tensors whose first dim is chunks times heads."""
        return slice(self.chunks.start * heads, self.chunks.stop * heads)

    def split(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        """x [chunks · heads, ...] -> one tensor a step."""
        return x.split_with_sizes([n * heads for n in self.sizes])

    def pack(self, x: Tensor, out: Tensor) -> Tensor:
        """Copies the slab's tokens of x [tokens, H, ...] into out [chunks, H, C, ...]; places without a token become 0."""
        for piece in self.pieces:
            place = _chunks(out, piece, piece.length, 0)
            place.copy_(_tokens(x, piece, self.C))
            if piece.length < self.C:
                _chunks(out, piece, self.C - piece.length, piece.length).zero_()
        return out

    def unpack(self, x: Tensor, out: Tensor) -> None:
        """Copies x [chunks, H, C, ...] to the slab's tokens of out [tokens, H, ...]."""
        for piece in self.pieces:
            _tokens(out, piece, self.C).copy_(_chunks(x, piece, piece.length, 0))


def _tokens(x: Tensor, piece: Piece, C: int) -> Tensor:
    """x [tokens, ...] -> view [sequences, steps, length, ...] of a piece."""
    strides = x.stride()
    step = strides[0]
    return x.as_strided(
        (piece.sequences, piece.steps, piece.length, *x.shape[1:]),
        (piece.apart * step, C * step, *strides),
        x.storage_offset() + piece.token * step,
    )


def _chunks(x: Tensor, piece: Piece, length: int, first: int) -> Tensor:
    """x [chunks, H, C, ...] -> view [sequences, steps, length, H, ...] of a piece, from each chunk's place `first` on."""
    _, H, _, *rest = x.shape
    chunk, head, place, *strides = x.stride()
    return x.as_strided(
        (piece.sequences, piece.steps, length, H, *rest),
        (chunk, piece.stride * chunk, place, head, *strides),
        x.storage_offset() + piece.chunk * chunk + first * place,
    )


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of one call. N sequences in `chunks` chunks of C tokens.

    order: int64 [N], the sequence behind each row of the sorted states, or None where they keep their order.
    heads: how many of the heads a slab is meant for.
    """

    N: int
    C: int
    chunks: int
    slabs: list[Slab]
    heads: int
    order: Tensor | None = None

    def sort_states(self, states: Tensor) -> Tensor:
        """[N, ...] by sequence -> by falling length."""
        return states if self.order is None else states.index_select(0, self.order)

    def unsort_states(self, states: Tensor) -> Tensor:
        if self.order is None:
            return states
        return torch.empty_like(states).index_copy_(0, self.order, states)


def chunk_layout(
    q: Tensor, cu_seqlens: Tensor | None, heads: int, C: int, most: int | None, least: int, together: bool
) -> ChunkLayout:
    """The layout of q's tokens ([B, T, ...], packed when cu_seqlens is given) in chunks of C.

    heads: that the chunks are worked on with. most: chunks times heads of a slab, None for no limit. least: steps that a slab
    has in any case. together: whether a slab is for all heads, or for as many as fit.
    """
    B, T = q.shape[:2]
    bounds = [(row * T + start, end - start) for row, start, end in sequence_bounds(cu_seqlens, B, T)]
    order = sorted(range(len(bounds)), key=lambda n: -bounds[n][1])
    runs = _runs([bounds[n] for n in order])
    sizes = [0] * -(-runs[0].length // C)
    for run in runs:
        for t in range(-(-run.length // C)):
            sizes[t] += run.sequences
    if most is not None and not together:
        # As many as fill a slab with the chunks of most steps, though the first steps, with all sequences, may be some larger.
        usual = most * len(sizes) // (least * sum(sizes))
        heads = max(1, min(heads, usual, LARGEST * most // (least * max(sizes))))
    before = [0, *itertools.accumulate(sizes)]
    slabs = [
        Slab(C, sizes[s:e], slice(before[s], before[e]), list(_pieces(runs, sizes, before, s, e, C)))
        for s, e in _cut(sizes, heads, most, least)
    ]
    kept = order == list(range(len(bounds)))
    places = None if kept else torch.tensor(order, device=q.device)
    return ChunkLayout(len(bounds), C, before[-1], slabs, heads, places)


def _runs(bounds: list[tuple[int, int]]) -> list[Run]:
    """bounds: start and length of each sequence, by falling length. Empty ones are in no run."""
    runs: list[Run] = []
    for rank, (start, length) in enumerate(bounds):
        if not length:
            break
        last = runs[-1] if runs else None
        if last is not None and last.length == length:
            apart = start - last.start if last.sequences == 1 else last.apart
            if start == last.start + last.sequences * apart:
                runs[-1] = last._replace(sequences=last.sequences + 1, apart=apart)
                continue
        runs.append(Run(rank, 1, start, 0, length))
    return runs


def _pieces(runs: list[Run], sizes: list[int], before: list[int], first: int, last: int, C: int) -> Iterator[Piece]:
    """The pieces of steps [first, last): none runs over a step at which the number of running sequences changes."""
    changes = [t for t in range(first + 1, last) if sizes[t] != sizes[t - 1]]
    for s, e in itertools.pairwise([first, *changes, last]):
        for run in runs:
            if run.length <= s * C:
                break
            whole = min(e, run.length // C)
            token, chunk = run.start + s * C, before[s] - before[first] + run.rank
            if whole > s:
                yield Piece(run.sequences, whole - s, C, token, run.apart, chunk, sizes[s])
            left = run.length - whole * C
            if whole < e and left > 0:
                done = whole - s
                yield Piece(run.sequences, 1, left, token + done * C, run.apart, chunk + done * sizes[s], sizes[s])


def _cut(sizes: list[int], heads: int, most: int | None, least: int) -> list[tuple[int, int]]:
    """Cuts the steps, given the chunks of each, into slabs [(first step, last step + 1)]."""
    if most is None:
        return [(0, len(sizes))]
    cuts, start, held = [], 0, 0
    for t, n in enumerate(sizes):
        if t - start >= least and (held + n) * heads > most:
            cuts.append((start, t))
            start, held = t, 0
        held += n
    return [*cuts, (start, len(sizes))]
