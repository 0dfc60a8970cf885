"""The decays of heads and the write strengths of a whole call, in the order in which `chunked_head.py` works.

Within a chunk of one head, the decay from token j to token i is the product of the steps between them: [C, C], lower
triangular. It is made by doubling, as in `decays.py`: the runs of 8 tokens for all chunks at once, the squares below them
slab by slab, where each becomes one outer product.

The order is: slab, group of key heads, value head of a key head, chunk, key head. All that a step of the work needs is then
a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.delta_rule.decays import doubling, lower_blocks, runs
from kernels.delta_rule.layout import ChunkLayout, Slab

RUN = 8


@dataclass(frozen=True)
class Part:
    """The chunks of a slab for some heads: M = chunks times key heads, of one value head each.

    index: of the slab. heads: key heads. value_heads: of all value heads. rows: the place among all chunks and value heads.
    states: the place of these heads' states, [N times key heads].
    """

    index: int
    slab: Slab
    heads: slice
    value_heads: slice
    rows: slice
    states: slice

    @property
    def H(self) -> int:
        """How many key heads."""
        return self.heads.stop - self.heads.start


def parts(layout: ChunkLayout, H: int, HV: int) -> Iterator[list[Part]]:
    """The work of a call, in order: for each slab and group of key heads, a part for each value head of a key head."""
    R, row = HV // H, 0
    for index, slab in enumerate(layout.slabs):
        for first in range(0, H, layout.heads):
            last = min(first + layout.heads, H)
            size, group = sum(slab.sizes) * (last - first), []
            for r in range(R):
                state = (first * R + r * (last - first)) * layout.N
                states = slice(state, state + layout.N * (last - first))
                value_heads = slice(first * R + r, last * R, R)
                group.append(Part(index, slab, slice(first, last), value_heads, slice(row, row + size), states))
                row += size
            yield group


@dataclass(frozen=True)
class Gates:
    """Of M = all chunks times value heads; in the accumulation dtype, and in the shapes in which they multiply a part's tensors.

    beta [M, 1, C]. read [M, 1, C, 1]: the decay from before the chunk through the step. write [M, C, 1]: beta, decayed from
    after the step to the end of the chunk; to_end [M, C, 1]: without beta. whole [M, 1, 1]: the decay over the chunk.
    blocks [M, C / 8, 8, 8]: from column to row within runs of 8 tokens. levels: for the squares of s = 8, 16 .. C / 2 tokens
    below the diagonal, the decays of their rows [M, C / 2s, s, 1] and of their columns [M, C / 2s, 1, s].
    """

    beta: Tensor
    read: Tensor
    write: Tensor
    to_end: Tensor
    whole: Tensor
    blocks: Tensor
    levels: list[tuple[Tensor, Tensor]]

    def pairs(self, rows: slice, out: Pairs) -> Tensor:
        """The decay from column to row [M, C, C] of a part's rows, in memory that the next call overwrites."""
        out.runs.copy_(self.blocks[rows])
        for (row, column), square in zip(self.levels, out.squares):
            torch.mul(row[rows], column[rows], out=square)
        return torch.threshold_(out.whole, faint(out.whole.dtype), 0.0)


class Pairs:
    """Memory for [M, C, C] decays: ones on the diagonal, zeros above it."""

    def __init__(self, M: int, C: int, like: Tensor):
        self.whole = like.new_zeros(M, C, C)
        self.runs = self.whole.unflatten(1, (-1, RUN)).unflatten(3, (-1, RUN)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        self.squares = [lower_blocks(self.whole, s) for s in sizes(C)]


def sizes(C: int) -> list[int]:
    return [s for s in (8, 16, 32) if s < C]


def faint(dtype: torch.dtype) -> float:
    """Decays not above this become 0 (5e-31 in fp32). Their products with inputs would be denormal numbers, and a matrix
    product that meets those takes ten times as long.
    """
    return float(torch.finfo(dtype).tiny ** 0.8)


def gather(x: Tensor, layout: ChunkLayout, H: int) -> Tensor:
    """x [tokens, HV] -> [chunks times value heads, C] in the order of the parts; 0 where a chunk has no token."""
    HV, C = x.shape[1], layout.C
    out = x.new_empty(layout.chunks * HV, C)
    for group in parts(layout, H, HV):
        for part in group:
            part.slab.pack(x[:, part.value_heads], out[part.rows].view(-1, part.H, C))
    return out


def scatter(x: Tensor, out: Tensor, layout: ChunkLayout, H: int) -> Tensor:
    """The reverse of `gather`, into out [tokens, HV]."""
    for group in parts(layout, H, out.shape[1]):
        for part in group:
            part.slab.unpack(x[part.rows].view(-1, part.H, layout.C), out[:, part.value_heads])
    return out


def gates(beta: Tensor, g: Tensor | None, layout: ChunkLayout, H: int, dtype: torch.dtype) -> Gates:
    """beta and g [tokens, HV]; without g nothing decays."""
    strength = gather(beta.to(dtype), layout, H)
    alpha = torch.ones_like(strength) if g is None else gather(g.to(dtype), layout, H).exp_()
    M, C = alpha.shape
    blocks = alpha.new_zeros(M, C // RUN, RUN, RUN)
    blocks.diagonal(dim1=2, dim2=3).fill_(1)
    levels, prefix, suffix = [], alpha, alpha
    for s, prefix, suffix in doubling(alpha[..., None]):
        if s < RUN:
            columns = runs(suffix.unflatten(1, (-1, RUN)), s, 0).mT
            torch.mul(runs(prefix.unflatten(1, (-1, RUN)), s, 1), columns, out=lower_blocks(blocks, s))
        elif s < C:
            levels.append((runs(prefix, s, 1).clone(), runs(suffix, s, 0).mT.clone()))
    from_start, to_end = (torch.threshold_(x, faint(dtype), 0.0) for x in (prefix, suffix))
    write = to_end * strength[..., None]
    return Gates(strength[:, None], from_start[:, None], write, to_end, from_start[:, -1:], blocks, levels)
