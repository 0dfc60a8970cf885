"""Validation windows: the split in file order, every token scored exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pretrain.data.batch import Batch, pack
from pretrain.data.errors import UsageError
from pretrain.data.order import Span, cut
from pretrain.data.store import Corpus


class ValidationSet:
    """A fixed list of windows over a corpus; iterating yields this rank's Batches.

    The stream of all documents in file order is cut as for training, but its remainder is kept as a last, shorter
    window. All ranks get the same number of batches of the same shape [1, micro_batch * sequence_length]: what is
    missing is filled without targets. limit: use only this many windows, spread evenly over the split.

    With bos before each document, every byte of the split is scored once: `bytes_scored` over all batches and ranks
    is then the size of `validation_text.bin`.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
        limit: int | None = None,
    ) -> None:
        if min(sequence_length, micro_batch, ranks) < 1 or not 0 <= rank < ranks:
            raise UsageError(
                f"sequence_length ({sequence_length}), micro_batch ({micro_batch}) and ranks ({ranks}) must be at "
                f"least 1 and rank ({rank}) below ranks"
            )
        if limit is not None and limit < 1:
            raise UsageError(f"validation limit must be at least 1 window, got {limit}; leave it out to use all")
        if corpus.tokens < 2:
            raise UsageError(f"{corpus.prefix} has {corpus.tokens} tokens, nothing to predict: prepare more text")
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.micro_batch = micro_batch
        self.rank = rank
        self.ranks = ranks
        self._ends = np.cumsum(corpus.lengths)
        available = -(-(corpus.tokens - 1) // sequence_length)
        kept = available if limit is None else min(limit, available)
        self.windows = np.arange(kept, dtype=np.int64) * available // kept

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-len(self.windows) // (self.ranks * self.micro_batch))

    def spans(self, window: int) -> list[Span]:
        """The tokens of window number `window` of the split, at most sequence_length + 1."""
        start = window * self.sequence_length
        return cut(self._ends, None, start, min(self.sequence_length + 1, self.corpus.tokens - start))

    def __iter__(self) -> Iterator[Batch]:
        fill = self.corpus.eos if self.corpus.eos is not None else 0
        for number in range(len(self)):
            first = (number * self.ranks + self.rank) * self.micro_batch
            chosen = [int(w) for w in self.windows[first : first + self.micro_batch]]
            spans = [self.spans(w) for w in chosen]
            spans += [[] for _ in range(self.micro_batch - len(spans))]
            yield pack(self.corpus, spans, self.sequence_length, fill)
