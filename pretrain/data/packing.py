"""How documents become training sequences: by concatenation and cutting, or packed whole by best fit (best_fit.py).

An arrangement answers, for any sequence number from 0 without end, which tokens that sequence holds: `row`, and for many
numbers at once `pieces`. It is a function of the documents' lengths, the sequence length and a key, and replays nothing
to get to a number.

Concatenated (order version 2). In epoch e the documents follow each other in the file's order, beginning with a
document drawn by (key, e) and going on at the file's first one after its last: a stream of L tokens, cut into W = (L -
1) // T windows of T inputs each, of which the last token predicts the first of the next window; the remaining (L - 1)
% T tokens wait for an epoch with other cuts. Windows are taken in the order of a permutation of (key, e), which has no
table. Documents are not shuffled here (version 1 did, at 16 bytes a document and a sort an epoch): `prepare` shuffles them,
and of a foreign file that was never shuffled the sequences of a step still come from everywhere. In a file sorted by
topic, documents of 1000 tokens and sequences of 4096, a step of 256 sequences then says as much of the topics' shares as
278 independent sequences would, 694 where documents are shuffled; of best fit, which reads few places at a time, 59.

BestFit. Documents of at most T tokens are never cut (Ding et al., "Fewer Truncations Improve Language Modeling", ICML
2024): they go, longest first, where least space is left. Longer ones are cut into sequences of T and a rest, which is
packed like a document. This is done in blocks of BLOCK documents; blocks are shuffled by (key, e) and read GROUP at a
time, their sequences shuffled within the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pretrain.data.errors import UsageError
from pretrain.data.order import Order, Span, cut
from pretrain.data.permute import hashed, permutation_of

_START, _WINDOWS = 3, 4  # apart from the purposes that version 1 numbers


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


class Pieces(NamedTuple):
    """Stretches of the file that make up many sequences, in order. row: int64 [P], which of the sequences that were asked
    for. first: int64 [P], token of the file. size: int64 [P], tokens. A sequence has T + 1 tokens, of which the last is a target
    only, or T and fewer: then its last has no target and what is missing is padding.
    """

    row: np.ndarray
    first: np.ndarray
    size: np.ndarray


class Arrangement(Protocol):
    """windows_per_epoch: sequences of one pass. padding: share of their positions that holds no token. of_documents: each
    of the `pieces` lies in one document; otherwise they are to be cut where documents begin.
    """

    @property
    def windows_per_epoch(self) -> float: ...

    @property
    def padding(self) -> float: ...

    @property
    def of_documents(self) -> bool: ...

    def row(self, sequence: int) -> Row: ...

    def pieces(self, sequences: np.ndarray) -> Pieces: ...


def ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of many ranges one after the other, and which range each is of: (range, number), int64."""
    sizes = ends - begins
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) + (begins - np.cumsum(sizes) + sizes)[of]


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
    of_documents = True

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int) -> None:
        self.order = Order(lengths, sequence_length, seed)
        self.windows_per_epoch = self.order.windows_per_epoch
        self._starts = np.cumsum(self.order.lengths) - self.order.lengths

    def row(self, sequence: int) -> Row:
        return from_spans(self.order.spans(sequence), self.order.sequence_length)

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """See Arrangement."""
        spans = [(row, span) for row, number in enumerate(sequences.tolist()) for span in self.order.spans(number)]
        found = [(row, int(self._starts[span.document]) + span.start, span.length) for row, span in spans]
        return Pieces(*np.array(found, np.int64).T)


class Concatenated:
    """starts: int64 [documents + 1], tokens before each document of the file. Memory: none of its own.

    Raises ValueError if there are fewer than sequence_length + 1 tokens.
    """

    padding = 0.0
    of_documents = False

    def __init__(self, starts: np.ndarray, sequence_length: int, *key: int) -> None:
        self.starts, self.sequence_length, self.key = starts, sequence_length, key
        self.tokens = int(starts[-1])
        require_tokens(self.tokens, sequence_length)
        self.windows_per_epoch = (self.tokens - 1) // sequence_length

    def row(self, sequence: int) -> Row:
        spans: list[Span] = []
        _, firsts, counts = self.pieces(np.array([sequence]))
        for first, count in zip(firsts.tolist(), counts.tolist()):
            spans += cut(self.starts[1:], None, first, count)
        return from_spans(spans, self.sequence_length)

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """See Arrangement: one a sequence, two around the file's end."""
        epochs, places = np.divmod(np.asarray(sequences, np.int64), self.windows_per_epoch)
        windows, begins = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permutation_of(self.windows_per_epoch, *self.key, epoch, _WINDOWS).many(places[here])
            begins[here] = self.starts[hashed(*self.key, epoch, _START) % (len(self.starts) - 1)]
        firsts = (begins + windows * self.sequence_length) % self.tokens
        counts = np.minimum(self.sequence_length + 1, self.tokens - firsts)
        around = np.flatnonzero(counts <= self.sequence_length)
        rows = np.arange(len(firsts))
        if not len(around):
            return Pieces(rows, firsts, counts)
        after = around + 1
        rest = self.sequence_length + 1 - counts[around]
        return Pieces(*(np.insert(a, after, b) for a, b in ((rows, around), (firsts, 0), (counts, rest))))


def require_tokens(tokens: int, sequence_length: int) -> None:
    """Raises ValueError unless one sequence can be cut from a stream of so many tokens."""
    if sequence_length < 1:
        raise UsageError(f"sequence_length must be at least 1, got {sequence_length}")
    if tokens <= sequence_length:
        raise UsageError(
            f"the corpus has {tokens} tokens, too few for one sequence of {sequence_length} + 1: "
            f"lower sequence_length to at most {max(tokens - 1, 0)} or prepare more text"
        )
