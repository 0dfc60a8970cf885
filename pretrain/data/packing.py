"""How documents become training sequences: by concatenation and cutting, or packed whole by best fit.

An arrangement answers, for any sequence number from 0 without end, which tokens that sequence holds: `row`. It is a
function of the documents' lengths, the sequence length and a key, and replays nothing to get to a number.

Concatenated (order version 2). In epoch e the documents follow each other in the file's order, beginning with a
document drawn by (key, e) and going on at the file's first one after its last: a stream of L tokens, cut into W = (L -
1) // T windows of T inputs each, of which the last token predicts the first of the next window; the remaining (L - 1)
% T tokens wait for an epoch with other cuts. Windows are taken in the order of a permutation of (key, e), which has no
table. Documents are not shuffled here (version 1 did, at 16 bytes a document and a sort an epoch): shuffling them is a
matter of preparing the corpus, and sequences, which are what a step is made of, come from everywhere.

BestFit. Documents of at most T tokens are never cut (Ding et al., "Fewer Truncations Improve Language Modeling", ICML
2024): they go, longest first, where least space is left. Longer ones are cut into sequences of T and a rest, which is
packed like a document. This is done in blocks of BLOCK documents, so that memory does not grow with the corpus but for
8 bytes a block; blocks are shuffled by (key, e) and read GROUP at a time, their sequences shuffled within the group.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pretrain.data.errors import UsageError
from pretrain.data.order import Order, Span, cut
from pretrain.data.permute import hashed, permutation_of

BLOCK, GROUP = 1024, 16
_START, _WINDOWS, _BLOCKS, _BINS = 3, 4, 5, 6  # apart from the purposes that version 1 numbers


@dataclass(frozen=True)
class Row:
    """One training sequence. pieces: its inputs, at most T tokens, in reading order; what is missing is padding.

    after: the token that follows the last input in the stream, where there is a stream. A piece's tokens are followed
    by the rest of its document in any case.
    """

    pieces: list[Span]
    after: Span | None = None

    @property
    def inputs(self) -> int:
        return sum(piece.length for piece in self.pieces)


Piece = tuple[int, int, int]  # a Span's fields: making a million of Spans takes longer than packing them


class Arrangement(Protocol):
    """windows_per_epoch: sequences of one pass. padding: share of their positions that holds no token."""

    windows_per_epoch: int
    padding: float

    def row(self, sequence: int) -> Row: ...


def from_spans(spans: list[Span], sequence_length: int) -> Row:
    """The row of a window of `sequence_length` + 1 tokens."""
    left = sequence_length
    pieces: list[Span] = []
    for span in spans:
        if left == 0:
            return Row(pieces, Span(span.document, span.start, 1))
        kept = min(span.length, left)
        pieces.append(Span(span.document, span.start, kept))
        left -= kept
        if kept < span.length:
            return Row(pieces, Span(span.document, span.start + kept, 1))
    return Row(pieces)


class Version1:
    """The order that runs began with before there was another one."""

    padding = 0.0

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int) -> None:
        self.order = Order(lengths, sequence_length, seed)
        self.windows_per_epoch = self.order.windows_per_epoch

    def row(self, sequence: int) -> Row:
        return from_spans(self.order.spans(sequence), self.order.sequence_length)


class Concatenated:
    """starts: int64 [documents + 1], tokens before each document of the file. Memory: none of its own.

    Raises ValueError if there are fewer than sequence_length + 1 tokens.
    """

    padding = 0.0

    def __init__(self, starts: np.ndarray, sequence_length: int, *key: int) -> None:
        self.starts, self.sequence_length, self.key = starts, sequence_length, key
        self.tokens = int(starts[-1])
        require_tokens(self.tokens, sequence_length)
        self.windows_per_epoch = (self.tokens - 1) // sequence_length

    def row(self, sequence: int) -> Row:
        epoch, place = divmod(sequence, self.windows_per_epoch)
        window = permutation_of(self.windows_per_epoch, *self.key, epoch, _WINDOWS)(place)
        first = (self._begin(epoch) + window * self.sequence_length) % self.tokens
        spans: list[Span] = []
        for start, count in self._pieces(first):
            spans += cut(self.starts[1:], None, start, count)
        return from_spans(spans, self.sequence_length)

    def _begin(self, epoch: int) -> int:
        return int(self.starts[hashed(*self.key, epoch, _START) % (len(self.starts) - 1)])

    def _pieces(self, first: int) -> list[tuple[int, int]]:
        length, total = self.sequence_length + 1, self.tokens
        return [(first, length)] if first + length <= total else [(first, total - first), (0, first + length - total)]

    def segments(self, sequences: np.ndarray) -> list[list[tuple[int, int]]]:
        """For each sequence number, where its T + 1 tokens lie in the file: (first token, count), two of them around its end."""
        epochs, places = np.divmod(sequences, self.windows_per_epoch)
        windows, begins = np.empty_like(places), np.empty_like(places)
        for epoch in sorted(set(epochs.tolist())):
            here = epochs == epoch
            windows[here] = permutation_of(self.windows_per_epoch, *self.key, epoch, _WINDOWS).many(places[here])
            begins[here] = self._begin(epoch)
        firsts = (begins + windows * self.sequence_length) % self.tokens
        return [self._pieces(first) for first in firsts.tolist()]


class BestFit:
    """starts: as for Concatenated. Raises ValueError if there is nothing to predict."""

    def __init__(self, starts: np.ndarray, sequence_length: int, *key: int) -> None:
        self.starts, self.sequence_length, self.key = starts, sequence_length, key
        documents = len(starts) - 1
        self._counts = np.zeros(-(-documents // BLOCK), np.int64)
        inputs = 0
        for block in range(len(self._counts)):
            bins, filled = self._pack(block)
            self._counts[block], inputs = len(bins), inputs + filled
        self.windows_per_epoch = int(self._counts.sum())
        if self.windows_per_epoch == 0:
            raise UsageError("no document of the corpus has two tokens, nothing to predict: prepare more text")
        self.padding = 1 - inputs / (self.windows_per_epoch * sequence_length)
        self._packed: OrderedDict[int, list[list[Piece]]] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def row(self, sequence: int) -> Row:
        epoch, place = divmod(sequence, self.windows_per_epoch)
        blocks, ends = self._epoch(epoch)
        # A group is GROUP blocks that follow each other in this epoch's order.
        group = int(np.searchsorted(ends[GROUP - 1 :: GROUP], place, side="right"))
        first, last = group * GROUP, min((group + 1) * GROUP, len(blocks))
        before = int(ends[first - 1]) if first else 0
        shuffled = permutation_of(int(ends[last - 1]) - before, *self.key, epoch, group, _BINS)
        place = before + shuffled(place - before)
        at = first + int(np.searchsorted(ends[first:last], place, side="right"))
        pieces = self._block(int(blocks[at]))[place - (int(ends[at - 1]) if at else 0)]
        return Row([Span(*piece) for piece in pieces])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._epochs.get(epoch)
        if found is None:
            count = len(self._counts)
            blocks = permutation_of(count, *self.key, epoch, _BLOCKS).many(np.arange(count))
            found = self._epochs[epoch] = (blocks, np.cumsum(self._counts[blocks]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def _block(self, block: int) -> list[list[Piece]]:
        found = self._packed.get(block)
        if found is None:
            found = self._packed[block] = self._pack(block)[0]
            while len(self._packed) > 3 * GROUP:
                self._packed.popitem(last=False)
        else:
            self._packed.move_to_end(block)
        return found

    def _pack(self, block: int) -> tuple[list[list[Piece]], int]:
        """The sequences of a block, and how many inputs they hold together."""
        length, first = self.sequence_length, block * BLOCK
        sizes = np.diff(self.starts[first : first + BLOCK + 1])
        bins: list[list[Piece]] = []
        rests = []
        for i, size in enumerate(sizes.tolist()):
            start = 0
            while size - start > length:
                bins.append([(first + i, start, length)])
                start += length
            # A last token by itself predicts nothing, and was predicted by the one before it.
            if size - start > 1:
                rests.append((start - size, first + i, start))
        rests.sort()
        filled = len(bins) * length
        open_bins: dict[int, list[int]] = {}
        spaces = 0  # bit s: some bin has space for s tokens left
        for negative, document, start in rests:
            size = -negative
            filled += size
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                same = open_bins[space]
                chosen = same.pop()
                if not same:
                    spaces ^= 1 << space
                bins[chosen].append((document, start, size))
            else:
                space, chosen = length, len(bins)
                bins.append([(document, start, size)])
            if space > size:
                open_bins.setdefault(space - size, []).append(chosen)
                spaces |= 1 << (space - size)
        return bins, filled


def require_tokens(tokens: int, sequence_length: int) -> None:
    """Raises ValueError unless one sequence can be cut from a stream of so many tokens."""
    if sequence_length < 1:
        raise UsageError(f"sequence_length must be at least 1, got {sequence_length}")
    if tokens <= sequence_length:
        raise UsageError(
            f"the corpus has {tokens} tokens, too few for one sequence of {sequence_length} + 1: "
            f"lower sequence_length to at most {max(tokens - 1, 0)} or prepare more text"
        )
