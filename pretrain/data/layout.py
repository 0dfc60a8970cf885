"""Where the tokens of many sequences lie in the files, and where their documents' borders are in the batches.

Worked out for a thousand sequences at a time, as arrays: what is left to do for each batch is to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.packing import ranges
from pretrain.data.stream import Stream


class Layout(NamedTuple):
    """R sequences of T inputs and a last target, of P pieces in order; in batches of so many sequences.

    begins: int64 [R + 1], pieces before each sequence. source, first, size: of each piece: where in the files it is. at:
    of each piece, its place among R (T + 1) tokens. ignored: positions among R T targets that are none, ascending. padded:
    positions among R T inputs that hold no token, ascending. cu_seqlens, padding: of each batch.
    """

    begins: np.ndarray
    source: np.ndarray
    first: np.ndarray
    size: np.ndarray
    at: np.ndarray
    ignored: np.ndarray
    padded: np.ndarray
    cu_seqlens: list[torch.Tensor]
    padding: list[int]


def lay_out(
    stream: Stream,
    starts: Sequence[np.ndarray],
    run: int,
    sources: np.ndarray,
    sequences: np.ndarray,
    length: int,
    rows: int,
    masked: bool,
) -> Layout:
    """starts: of each source, see Corpus. sources, sequences: int64 [R], of each sequence its source and number there.
    length: T. rows: sequences of a batch.
    """
    parts, lasts = [], [np.empty(0, np.int64)]
    each = np.unique(sources).tolist()
    for source in each:
        mine = np.flatnonzero(sources == source)
        arrangement = stream.arrangement(run, source)
        row, first, size = arrangement.pieces(sequences[mine])
        row = mine[row]
        before = np.cumsum(size) - size
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        column = before - np.repeat(before[begins], np.diff(begins, append=len(row)))
        parts.append((row, np.full(len(row), source), first, size, row * (length + 1) + column))
        if not masked:
            continue
        if arrangement.of_documents:
            inner = np.flatnonzero(column)
            lasts.append(row[inner] * length + column[inner] - 1)
        else:
            # A document at a sequence's beginning has no token before it there.
            low = starts[source].searchsorted(first + (column == 0))
            of, document = ranges(low, starts[source].searchsorted(first + size))
            lasts.append(starts[source][document] - first[of] + (row * length + column - 1)[of])
    row, of, first, size, at = (np.concatenate(part) for part in zip(*parts))
    if len(each) > 1:
        order = np.argsort(row, kind="stable")
        row, of, first, size, at = row[order], of[order], first[order], size[order], at[order]
    total = len(sequences)
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=total))])
    last = np.concatenate(lasts)  # inputs that are the last of their document: no other's first token is their target
    filled = np.bincount(row, size, total).astype(np.int64)
    # What fills a sequence up is a packed sequence of its own, without targets; the last token before it has none either.
    short = np.flatnonzero(filled <= length)
    ends = short * length + filled[short]
    _, padded = ranges(ends, (short + 1) * length)
    ignored = np.concatenate([last, ends - 1, padded])
    if short.size or len(each) > 1:
        ignored.sort(kind="stable")  # which merges what is in order already
    cu_seqlens = _borders([np.arange(total) * length, last + 1, ends], total // rows, rows * length)
    padding = np.maximum(length - filled, 0).reshape(-1, rows).sum(axis=1)
    return Layout(begins, of, first, size, at, ignored, padded, cu_seqlens, padding.tolist())


def _borders(found: list[np.ndarray], number: int, total: int) -> list[torch.Tensor]:
    """cu_seqlens of so many batches of `total` positions, from all positions at which there is a border."""
    border = np.concatenate(found)
    border.sort(kind="stable")
    # An empty document begins where the next one does; one after the last input where the next sequence does.
    border = border[np.flatnonzero(np.diff(border, append=number * total))]
    # Each batch counts from its own beginning, and has its end as a last border.
    batch = border // total
    cu_seqlens = np.full(len(border) + number, total, np.int32)
    cu_seqlens[np.arange(len(border)) + batch] = border - batch * total
    sizes = np.bincount(batch, minlength=number) + 1
    return list(torch.from_numpy(cu_seqlens).split(sizes.tolist()))
