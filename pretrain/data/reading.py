"""Batches of prepared sources, as fast as slices of their files.

What takes time is not the tokens' way but Python's to them. So the order is worked out for a thousand sequences at a
time, as arrays, and several steps are read at once where they are small and asked for one after the other; a step that
is asked for out of turn is read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.data.batch import IGNORE, Batch, filling
from pretrain.data.packing import ranges
from pretrain.data.store import Corpus
from pretrain.data.stream import Stream

_PLANNED = 1024  # sequences of this rank, and
_PASSED = 8192  # of all ranks, that are worked out at once
_TOKENS = 1 << 17  # that are read at once, if they are of several steps
_CACHED = 1 << 16  # that are copied before they are widened


class Layout(NamedTuple):
    """Which stretches of the files make up sequences 0, 1, .. of a plan. P pieces in order, R sequences of T tokens.

    begins: int64 [R + 1], pieces before each sequence. source, first, size: of each piece. at: of each piece, its place
    among R (T + 1) tokens. filled: int64 [R], tokens of each sequence, T + 1 if it is full. last: int64, ascending,
    positions among R T inputs whose token is the last of its document, where documents are masked.
    """

    begins: np.ndarray
    source: np.ndarray
    first: np.ndarray
    size: np.ndarray
    at: np.ndarray
    filled: np.ndarray
    last: np.ndarray


def lay_out(
    stream: Stream,
    starts: Sequence[np.ndarray],
    run: int,
    sources: np.ndarray,
    sequences: np.ndarray,
    length: int,
    masked: bool,
) -> Layout:
    """starts: of each source, see Corpus. sources, sequences: int64 [R], of each sequence its source and number there."""
    parts, last = [], [np.empty(0, np.int64)]
    each = np.unique(sources).tolist()
    for source in each:
        mine = np.flatnonzero(sources == source)
        arrangement = stream.arrangement(run, source)
        row, first, count = arrangement.pieces(sequences[mine])
        row = mine[row]
        before = np.cumsum(count) - count
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        column = before - np.repeat(before[begins], np.diff(begins, append=len(row)))
        parts.append((row, np.full(len(row), source), first, count, row * (length + 1) + column))
        if not masked:
            continue
        if arrangement.of_documents:
            inner = np.flatnonzero(column)
            last.append(row[inner] * length + column[inner] - 1)
        else:
            # A document at a sequence's beginning has no token before it there.
            low = starts[source].searchsorted(first + (column == 0))
            of, document = ranges(low, starts[source].searchsorted(first + count))
            last.append(starts[source][document] - first[of] + (row * length + column - 1)[of])
    row, of, first, size, at = (np.concatenate(part) for part in zip(*parts))
    ends = np.concatenate(last)
    if len(each) > 1:
        order = np.argsort(row, kind="stable")
        row, of, first, size, at = row[order], of[order], first[order], size[order], at[order]
        ends.sort()
    filled = np.bincount(row, size, len(sequences)).astype(np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=len(sequences)))])
    return Layout(begins, of, first, size, at, filled, ends)


class Reader:
    """Batches of a rank, by step; None for a step with a token outside the vocabulary, which is to be read with care.

    It remembers what it has read ahead: `forget` when the stream passes over something else, or numbers steps anew.
    """

    def __init__(self, stream: Stream, corpora: Sequence[Corpus], rank: int, ranks: int, masked: bool) -> None:
        self._stream, self._corpora, self._masked = stream, corpora, masked
        self._rank, self._ranks = rank, ranks
        self._starts = [corpus.starts for corpus in corpora]
        self._filling = [filling(corpus) for corpus in corpora]
        self._limits = {corpus.vocabulary_size for corpus in corpora}
        dtypes = {corpus.dtype for corpus in corpora}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.int64)
        # Slices of memory views take half the time of arrays' slices, but do not convert.
        self._views = not dtypes
        self._mapped = [self._view(corpus.ids) for corpus in corpora]
        self._cache = np.empty(0, self._dtype)
        self.forget()

    def _view(self, ids: np.ndarray) -> Any:
        return ids.data if self._views else ids

    def forget(self) -> None:
        self._ready: dict[int, list[Batch]] = {}
        self._steps: range = range(0)
        self._layout: Layout | None = None
        self._last, self._stride = -1, 1

    def read(self, step: int) -> list[Batch] | None:
        """The micro-batches of a step, in order. Raises ValueError for a step before the run's first."""
        found = self._ready.pop(step, None)
        if found is None:
            self._ready.clear()
            found = self._read(step)
        self._stride, self._last = (step - self._last if 0 < step - self._last <= _PASSED else 1), step
        return found

    def _read(self, step: int) -> list[Batch] | None:
        stage = self._stream.timetable.at(step).stage
        rows, length = stage.batch // self._ranks, stage.sequence_length
        in_turn = step - self._last == self._stride
        if step not in self._steps:
            self._plan(step, max(1, min(_PLANNED // rows, _PASSED // stage.batch)) if in_turn else 1)
        assert self._layout is not None
        first = self._steps.index(step)
        count = min(len(self._steps) - first, max(1, _TOKENS // (rows * length))) if in_turn else 1
        read = self._rows(self._layout, first * rows, (first + count) * rows, length)
        if read is None and count > 1:
            count = 1  # what comes later is damaged, or this
            read = self._rows(self._layout, first * rows, (first + 1) * rows, length)
        if read is None:
            return None
        batches = self._batches(self._layout, *read, first * rows, stage.micro_batch, length)
        each = rows // stage.micro_batch
        for number, ahead in enumerate(self._steps[first + 1 : first + count], 1):
            self._ready[ahead] = batches[number * each : (number + 1) * each]
        return batches[:each]

    def _plan(self, step: int, count: int) -> None:
        timetable = self._stream.timetable
        segment, end = timetable.at(step), timetable.end(step)
        self._steps = range(step, int(min(step + count * self._stride, end)), self._stride)
        stage = segment.stage
        starts = range(self._rank * stage.micro_batch, stage.batch, self._ranks * stage.micro_batch)
        of_step = (np.array(starts)[:, None] + np.arange(stage.micro_batch)).reshape(-1)
        numbers = (np.array(self._steps) - step)[:, None] * stage.batch + of_step
        sources, sequences = self._stream.sequences(step, numbers.reshape(-1))
        given = (segment.begin.run, sources, sequences, stage.sequence_length, self._masked)
        self._layout = lay_out(self._stream, self._starts, *given)

    def _rows(self, layout: Layout, begin: int, end: int, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens and what follows each of them, int64 [end - begin, T], of sequences of a plan; None if any is damaged."""
        tokens, targets = (np.empty((end - begin, length), np.int64) for _ in range(2))
        together = max(1, _CACHED // (length + 1))
        if self._cache.size < together * (length + 1):
            self._cache = np.empty(together * (length + 1), self._dtype)
        mapped = self._mapped
        into = self._view(self._cache)
        for low in range(begin, end, together):
            high = min(low + together, end)
            pieces = slice(layout.begins[low], layout.begins[high])
            places = (layout.at[pieces] - low * (length + 1)).tolist()
            firsts, sizes = layout.first[pieces].tolist(), layout.size[pieces].tolist()
            if len(mapped) == 1:
                (one,) = mapped
                for at, first, size in zip(places, firsts, sizes):
                    into[at : at + size] = one[first : first + size]
            else:
                for source, at, first, size in zip(layout.source[pieces].tolist(), places, firsts, sizes):
                    into[at : at + size] = mapped[source][first : first + size]
            read = self._cache[: (high - low) * (length + 1)].reshape(high - low, length + 1)
            self._fill(layout, read, low, high)
            if not self._sound(layout, read, low):
                return None
            tokens[low - begin : high - begin] = read[:, :-1]
            targets[low - begin : high - begin] = read[:, 1:]
        return tokens, targets

    def _fill(self, layout: Layout, read: np.ndarray, low: int, high: int) -> None:
        filled = layout.filled[low:high]
        for row in np.flatnonzero(filled <= read.shape[1] - 1).tolist():
            read[row, filled[row] :] = self._filling[layout.source[layout.begins[low + row]]]

    def _sound(self, layout: Layout, read: np.ndarray, low: int) -> bool:
        """Whether all tokens are ids of their source's vocabulary."""
        if read.dtype.kind == "i" and int(read.min()) < 0:
            return False
        if len(self._limits) == 1:
            (limit,) = self._limits
            return limit is None or int(read.max()) < limit
        limits = [np.inf if each.vocabulary_size is None else each.vocabulary_size for each in self._corpora]
        source = layout.source[layout.begins[low : low + len(read)]]
        return bool((read.max(axis=1) < np.array(limits)[source]).all())

    def _batches(
        self, layout: Layout, tokens: np.ndarray, targets: np.ndarray, begin: int, rows: int, length: int
    ) -> list[Batch]:
        """Batches of `rows` sequences, which are views of arrays of them all; begin: the first one's number in the plan."""
        number, total = len(tokens) // rows, rows * length
        filled = layout.filled[begin : begin + len(tokens)]
        short = np.flatnonzero(filled <= length)
        low, high = layout.last.searchsorted([begin * length, (begin + len(tokens)) * length]).tolist()
        last = layout.last[low:high] - begin * length
        # What fills a sequence up is a packed sequence of its own, without targets.
        targets.reshape(-1)[last] = IGNORE
        border = np.zeros(tokens.size + 1, bool)
        border[::length] = True
        border[last + 1] = True
        for row, used in zip(short.tolist(), filled[short].tolist()):
            targets[row, used - 1 :] = IGNORE
        border[short * length + filled[short]] = True
        borders = np.flatnonzero(border[:-1])
        # Each batch counts from its own beginning, and has its end as a last border.
        batch = borders // total
        cu_seqlens = np.full(len(borders) + number, total, np.int32)
        cu_seqlens[np.arange(len(borders)) + batch] = borders - batch * total
        sizes = (np.bincount(batch, minlength=number) + 1).tolist()
        padding = np.maximum(length - filled, 0).reshape(number, rows).sum(axis=1).tolist()
        parts = (
            torch.from_numpy(tokens.reshape(number, 1, total)).unbind(),
            torch.from_numpy(targets.reshape(number, 1, total)).unbind(),
            torch.from_numpy(cu_seqlens).split(sizes),
        )
        return [Batch(*each) for each in zip(*parts, padding)]
