"""How one packed row is cut over ranks: arithmetic only.

The row of T tokens is cut into 2 * ranks chunks of equal length, and rank r has chunks r and 2 * ranks - 1 - r, in this order.
With causal attention a chunk's work grows with its place in the row, and this pairing ("zig-zag") gives all ranks the same.
Documents lie in the row as they come and cross the borders of chunks freely.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Tokens [start, end) of the row, within one chunk and one document, which begins at `document`."""

    start: int
    end: int
    document: int

    @property
    def continues(self) -> bool:
        """Whether the document began before."""
        return self.document < self.start


@dataclass(frozen=True)
class Cut:
    """One rank's part of a row of `length` tokens. borders: first token of every document, rising from 0, then `length`."""

    ranks: int
    rank: int
    length: int
    borders: tuple[int, ...]

    @staticmethod
    def of(ranks: int, rank: int, length: int, cu_seqlens: Tensor | None) -> Cut:
        """cu_seqlens: int [N+1], borders of the whole row. Raises ValueError where they are not those of `length` tokens."""
        check_length(length, ranks)
        bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens must rise from 0 to {length}, the tokens of the whole row that {ranks} context-parallel ranks "
                f"share, got {bounds}; it describes the row before it was cut"
            )
        return Cut(ranks, rank, length, tuple(sorted(set(bounds))))  # without empty documents

    @property
    def chunk(self) -> int:
        """Tokens in a chunk."""
        return self.length // (2 * self.ranks)

    @property
    def chunks(self) -> tuple[int, int]:
        """This rank's chunks, by number."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def place(self, chunk: int) -> int:
        """Where a chunk lies among all ranks' pairs of chunks, joined in the order of ranks."""
        return 2 * chunk if chunk < self.ranks else 2 * (2 * self.ranks - 1 - chunk) + 1

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """For each of this rank's chunks, its pieces in order."""
        return [self.pieces_of(chunk) for chunk in self.chunks]

    def pieces_of(self, chunk: int) -> list[Piece]:
        start, end = chunk * self.chunk, (chunk + 1) * self.chunk
        inside = [(a, b) for a, b in pairwise(self.borders) if a < end and b > start]
        return [Piece(max(a, start), min(b, end), a) for a, b in inside]

    def local(self) -> Tensor:
        """int32 [pieces + 1]: where this rank's pieces begin in its own tokens, then their number."""
        lengths = [piece.end - piece.start for pieces in self.pieces for piece in pieces]
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def tokens(self) -> Tensor:
        """int64 [2 * chunk]: where each of this rank's tokens lies in the row."""
        return shard(torch.arange(self.length), self.ranks, self.rank, dim=0)

    def owners(self) -> Tensor:
        """int64 [2 * chunk]: the number of each token's document, among all of the row."""
        return torch.bucketize(self.tokens(), torch.tensor(self.borders[1:-1]), right=True)

    def positions(self) -> Tensor:
        """int64 [2 * chunk]: each token's place in its document."""
        return self.tokens() - torch.tensor(self.borders)[self.owners()]

    def last(self) -> Tensor:
        """bool [2 * chunk]: which tokens are the last of their document."""
        return torch.isin(self.tokens() + 1, torch.tensor(self.borders))


def check_length(length: int, ranks: int) -> None:
    """Raises ValueError unless a row of `length` tokens can be cut over `ranks`."""
    if length % (2 * ranks):
        raise ValueError(
            f"a row of {length} tokens cannot be cut into {2 * ranks} equal chunks, two for each of {ranks} context-parallel "
            f"ranks (mesh.cp); choose a multiple of {2 * ranks} tokens a row"
        )


def check_reach(reach: int, length: int, ranks: int) -> None:
    """Raises ValueError where a convolution that looks `reach` tokens back looks beyond the chunk before its own."""
    chunk = length // (2 * ranks)
    if reach > chunk:
        raise ValueError(
            f"a convolution looks {reach} tokens back, but {ranks} context-parallel ranks (mesh.cp) cut a row of {length} tokens "
            f"into chunks of {chunk}; choose fewer ranks, or rows of at least {2 * ranks * reach} tokens"
        )


def shard(row: Tensor, ranks: int, rank: int, dim: int = 1) -> Tensor:
    """One rank's tokens of a row that has them along dim (tokens or targets [1, T]), its two chunks one after the other.

    Raises ValueError where the row cannot be cut.
    """
    check_length(row.shape[dim], ranks)
    chunks = row.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim)


def unshard(parts: list[Tensor], dim: int = 1) -> Tensor:
    """The row, from all ranks' parts in the order of ranks: the inverse of shard."""
    firsts, seconds = zip(*(part.chunk(2, dim) for part in parts))
    return torch.cat((*firsts, *reversed(seconds)), dim)


def cut_batch(batch: Any, mesh: Any) -> Any:
    """A dataclass with tokens and targets [1, T] -> the same with this rank's shard of both; borders stay the whole row's."""
    ranks = mesh.size("cp")
    if ranks == 1:
        return batch
    rank = mesh.rank("cp")
    parts = {name: shard(getattr(batch, name), ranks, rank) for name in ("tokens", "targets")}
    return dataclasses.replace(batch, **parts)
