"""The one token order: which tokens are training sequence i, for every i, whatever the number of processes.

Epoch e shuffles the documents by (seed, e) and concatenates them into a stream of L tokens. The stream is cut into W
= (L - 1) // T windows: window w reads inputs [wT, wT + T) and predicts [wT + 1, wT + T + 1), so neighbours share one
token and each token of the stream but the first is a target once; the last (L - 1) % T < T tokens wait for another
epoch's shuffle. The windows are shuffled by (seed, e) as well. Sequence i is window i % W of epoch i // W. Nothing is
replayed to get there: two hashes and a binary search.

The shuffles sort by splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of the element's number rather than call numpy's
generators, whose streams may change between releases: an order that a checkpoint refers to must not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.errors import UsageError

ORDER_VERSION = 1
_DOCUMENTS, _WINDOWS = 1, 2


@dataclass(frozen=True)
class Span:
    """`length` tokens of document `document` from token `start` on."""

    document: int
    start: int
    length: int


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], fixed by the integers in `key` for all time."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_splitmix64(np.arange(n, dtype=np.uint64) ^ state), kind="stable")


def cut(ends: np.ndarray, documents: np.ndarray | None, start: int, length: int) -> list[Span]:
    """The spans that cover stream positions [start, start + length).

    ends: int64 [D], cumulated document lengths in stream order. documents: int64 [D], the document at each place of
    the stream, None for the identity.
    """
    spans = []
    place = int(np.searchsorted(ends, start, side="right"))
    while length > 0:
        begin = int(ends[place - 1]) if place else 0
        offset = start - begin
        size = min(int(ends[place]) - begin - offset, length)
        if size > 0:  # a document without tokens has a place but no span
            spans.append(Span(int(documents[place]) if documents is not None else place, offset, size))
        start, length, place = start + size, length - size, place + 1
    return spans


Skipped = Sequence[tuple[int, int]]
"""Sequence numbers [first, end) that a run leaves out; ascending, apart from each other."""


def past(skipped: Skipped, used: int) -> int:
    """The number, in the order, of the sequence that a run uses after it has used `used` others."""
    for first, end in skipped:
        if used >= first:
            used += end - first
    return used


def past_all(skipped: Skipped, used: np.ndarray) -> np.ndarray:
    """`past` of many, int64."""
    for first, end in skipped:
        used = np.where(used >= first, used + (end - first), used)
    return used


def joined(skipped: Skipped, first: int, end: int) -> list[tuple[int, int]]:
    """`skipped` with [first, end) added."""
    apart = [span for span in skipped if span[1] < first or span[0] > end]
    touching = [(first, end), *(span for span in skipped if span not in apart)]
    return sorted([*apart, (min(span[0] for span in touching), max(span[1] for span in touching))])


class Order:
    """Sequence number -> spans of T + 1 tokens (the last one is a target only). Blind to ranks and to batch sizes.

    lengths: int64 [documents], tokens in each document. Memory: 16 bytes a document and 8 a window for each of the
    two epochs kept. Raises ValueError if the corpus has fewer than sequence_length + 1 tokens.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int) -> None:
        if sequence_length < 1:
            raise UsageError(f"sequence_length must be at least 1, got {sequence_length}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokens = int(self.lengths.sum())
        self.windows_per_epoch = (self.tokens - 1) // sequence_length
        if self.windows_per_epoch < 1:
            raise UsageError(
                f"the corpus has {self.tokens} tokens, too few for one sequence of {sequence_length} + 1: "
                f"lower sequence_length to at most {max(self.tokens - 1, 0)} or prepare more text"
            )
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Two epochs, because a step (or the prefetch of the next one) may lie across the border.
        found = self._epochs.get(epoch)
        if found is None:
            documents = permutation(len(self.lengths), self.seed, epoch, _DOCUMENTS)
            windows = permutation(self.windows_per_epoch, self.seed, epoch, _WINDOWS)
            found = (documents, np.cumsum(self.lengths[documents]), windows)
            self._epochs[epoch] = found
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def spans(self, sequence: int) -> list[Span]:
        """The T + 1 tokens of training sequence number `sequence` (from 0, without end), in reading order."""
        if sequence < 0:
            raise UsageError(f"sequence numbers start at 0, got {sequence}")
        epoch, place = divmod(sequence, self.windows_per_epoch)
        documents, ends, windows = self._epoch(epoch)
        return cut(ends, documents, int(windows[place]) * self.sequence_length, self.sequence_length + 1)
