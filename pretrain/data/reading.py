"""Batches of prepared sources, as fast as slices of their files.

What takes time is not the tokens' way but Python's to them. So the order is worked out for a thousand sequences at a
time, as arrays, and several steps are read at once where they are small and asked for one after the other; a step that
is asked for out of turn is read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pretrain.data.batch import IGNORE, Batch, filling
from pretrain.data.layout import Layout, lay_out
from pretrain.data.store import Corpus
from pretrain.data.stream import Stream

_PLANNED = 1024  # sequences of this rank, and
_PASSED = 8192  # of all ranks, or
_PLANNED_TOKENS = 1 << 23  # of theirs, that are worked out at once
_TOKENS = 1 << 17  # that are read at once, if they are of several steps
_CACHED = 1 << 16  # that are copied before they are widened


class Reader:
    """Batches of a rank, by step; None for a step that is to be read with care: with a token outside the vocabulary in it,
    or in one that would be read together with it.

    It remembers what it has read ahead: `forget` when the stream passes over something else, or numbers steps anew.
    """

    def __init__(self, stream: Stream, corpora: Sequence[Corpus], rank: int, ranks: int, masked: bool) -> None:
        self._stream, self._corpora, self._masked = stream, corpora, masked
        self._rank, self._ranks = rank, ranks
        self._starts = [corpus.starts for corpus in corpora]
        self._filling = np.array([filling(corpus) for corpus in corpora])
        self._limits = {corpus.vocabulary_size for corpus in corpora}
        dtypes = {corpus.dtype for corpus in corpora}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.int64)
        # Slices of memory views take half the time of arrays' slices, but do not convert.
        self._views = not dtypes
        self._mapped = [self._view(corpus.ids) for corpus in corpora]
        self._cache = np.zeros(0, self._dtype)
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
            most = min(_PLANNED // rows, _PASSED // stage.batch, _PLANNED_TOKENS // (rows * length))
            self._plan(step, max(1, most) if in_turn else 1)
        assert self._layout is not None
        layout, first = self._layout, self._steps.index(step)
        count = min(len(self._steps) - first, max(1, _TOKENS // (rows * length))) if in_turn else 1
        read = self._rows(layout, first * rows, (first + count) * rows, length)
        if read is None:
            return None
        # Batches are views of one array of them all.
        each = rows // stage.micro_batch
        tokens, targets = (torch.from_numpy(ids.reshape(count * each, 1, -1)).unbind() for ids in read)
        number = slice(first * each, (first + count) * each)
        batches = [Batch(*parts) for parts in zip(tokens, targets, layout.cu_seqlens[number], layout.padding[number])]
        for ahead in range(1, count):
            self._ready[self._steps[first + ahead]] = batches[ahead * each : (ahead + 1) * each]
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
        given = (segment.begin.run, sources, sequences, stage.sequence_length, stage.micro_batch, self._masked)
        self._layout = lay_out(self._stream, self._starts, *given)

    def _rows(self, layout: Layout, begin: int, end: int, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens and what follows each of them, int64 [end - begin, T], of sequences of a plan; None if any is damaged."""
        tokens, targets = (np.empty((end - begin, length), np.int64) for _ in range(2))
        together = max(1, _CACHED // (length + 1))
        if self._cache.size < together * (length + 1):
            self._cache = np.zeros(together * (length + 1), self._dtype)
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
            if not self._sound(layout, read, low):
                self._cache[:] = 0
                return None
            tokens[low - begin : high - begin] = read[:, :-1]
            targets[low - begin : high - begin] = read[:, 1:]
        low, high = layout.ignored.searchsorted([begin * length, end * length]).tolist()
        targets.reshape(-1)[layout.ignored[low:high] - begin * length] = IGNORE
        low, high = layout.padded.searchsorted([begin * length, end * length]).tolist()
        if low < high:
            source = layout.source[layout.begins[layout.padded[low:high] // length]]
            tokens.reshape(-1)[layout.padded[low:high] - begin * length] = self._filling[source]
        return tokens, targets

    def _sound(self, layout: Layout, read: np.ndarray, low: int) -> bool:
        """Whether all tokens are ids of their source's vocabulary."""
        if read.dtype.kind == "i" and int(read.min()) < 0:
            return False
        if len(self._limits) == 1:
            (limit,) = self._limits
            return limit is None or int(read.max()) < limit
        # A short sequence's end holds what was read before, which may be of another source.
        limits = [np.inf if each.vocabulary_size is None else each.vocabulary_size for each in self._corpora]
        source = layout.source[layout.begins[low : low + len(read)]]
        return bool((read.max(axis=1) < np.array(limits)[source]).all())
