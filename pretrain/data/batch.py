"""One packed micro-batch, and how spans of documents become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.data.errors import DataError
from pretrain.data.order import Span

if TYPE_CHECKING:
    from pretrain.data.packing import Row
    from pretrain.data.store import Corpus

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Several windows packed into one row of N tokens.

    tokens: int64 [1, N]. targets: int64 [1, N], the next token of the same document, -100 where there is none (a
    document's last token, padding). cu_seqlens: int32 [S + 1], ascending from 0 to N, a border at each document start
    and each window start: nothing may be carried across one. padding: how many of the N positions hold no token of a
    document. damaged: how many of these would, if the data were sound (see DataConfig.on_bad).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    padding: int = 0
    damaged: int = 0

    @property
    def scored(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORE).sum())

    @property
    def longest(self) -> int:
        """Tokens in the longest packed sequence (max_seqlen)."""
        return int(self.cu_seqlens.diff().max())

    def positions(self) -> torch.Tensor:
        """int64 [1, N]: each token's place within its own packed sequence, from 0."""
        starts, sizes = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        total = self.tokens.shape[1]
        return (torch.arange(total, device=starts.device) - starts.repeat_interleave(sizes)).unsqueeze(0)

    def bytes_scored(self, token_bytes: torch.Tensor) -> int:
        """Bytes of text that the counted targets stand for; bits per byte = summed nats / ln 2 / this. token_bytes:
        int [vocabulary].
        """
        return int(token_bytes.to(self.targets.device)[self.targets[self.targets != IGNORE]].sum(dtype=torch.int64))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device. From pinned memory the copy is always one that the host does not wait for."""
        beside = non_blocking or (self.tokens.device.type == "cpu" and self.tokens.is_pinned())
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=beside),
            targets=self.targets.to(device, non_blocking=beside),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=beside),
        )

    def pin(self) -> Batch:
        """The same batch in page-locked host memory, from which a GPU copies beside other work. Needs a GPU."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            targets=self.targets.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
        )


def pack(corpus: Corpus, windows: Sequence[Sequence[Span]], sequence_length: int, fill: int = 0) -> Batch:
    """Reads windows and packs them into one row.

    windows: for each window the spans of its tokens, the last of which is a target only (so at most sequence_length +
    1 tokens). A shorter window is filled up with `fill` without targets, as a packed sequence of its own; an empty
    one is all filling. Every batch has N = len(windows) * sequence_length tokens, because collectives and pipeline
    stages need one shape on all ranks. Raises DataError for a token outside the vocabulary.
    """
    total = len(windows) * sequence_length
    tokens = np.full(total, fill, np.int64)
    targets = np.full(total, IGNORE, np.int64)
    borders: list[int] = []
    for number, spans in enumerate(windows):
        base, filled = number * sequence_length, 0
        for span in spans:
            values = corpus.read(span.document, span.start, span.length)
            kept = min(span.length, sequence_length - filled)
            at = base + filled
            if kept > 0:
                borders.append(at)
                tokens[at : at + kept] = values[:kept]
                followed = min(kept, span.length - 1)
                targets[at : at + followed] = values[1 : followed + 1]
            filled += span.length
        # The last token of a window is only a target: a short window ends one token before what was read.
        used = min(max(filled - 1, 0), sequence_length)
        if used < sequence_length:
            tokens[base + used : base + sequence_length] = fill
            borders = [b for b in borders if b < base + used]
            borders.append(base + used)
    cu_seqlens = np.array([*borders, total], np.int32)
    return Batch(
        torch.from_numpy(tokens).unsqueeze(0), torch.from_numpy(targets).unsqueeze(0), torch.from_numpy(cu_seqlens)
    )


def pack_rows(
    corpora: Sequence[Corpus],
    rows: Sequence[tuple[int, Row]],
    sequence_length: int,
    *,
    masked: bool = True,
    skip_bad: bool = False,
) -> Batch:
    """Reads rows of any sources into one batch: what reading.Reader does, piece by piece.

    corpora: the sources. rows: (index of the source, row). masked: documents in a row do not see each other and none
    is predicted from another; otherwise a row is one sequence, but for its padding. skip_bad: a piece with a token
    outside the vocabulary becomes padding and is counted, instead of a DataError.
    """
    total = len(rows) * sequence_length
    tokens = np.empty(total, np.int64)
    targets = np.full(total, IGNORE, np.int64)
    borders: list[int] = []
    damaged = padding = 0
    for number, (source, row) in enumerate(rows):
        corpus, at = corpora[source], number * sequence_length
        end = at + sequence_length
        joined = False  # whether what stands before `at` predicts what comes there
        for piece in row.pieces:
            goes_on = piece.start + piece.length < int(corpus.lengths[piece.document])
            try:
                values = corpus.read(piece.document, piece.start, piece.length + goes_on)
            except DataError:
                if not skip_bad:
                    raise
                tokens[at : at + piece.length] = filling(corpus)
                borders.append(at)
                damaged, joined, at = damaged + piece.length, False, at + piece.length
                continue
            if masked or not joined:
                borders.append(at)
            else:
                targets[at - 1] = values[0]
            tokens[at : at + piece.length] = values[: piece.length]
            followed = piece.length - 1 + goes_on
            targets[at : at + followed] = values[1 : followed + 1]
            at, joined = at + piece.length, True
        if at < end:
            tokens[at:end] = filling(corpus)
            borders.append(at)
            padding += end - at
        elif row.after is not None and joined and not masked:
            try:
                targets[end - 1] = corpus.read(row.after.document, row.after.start, 1)[0]
            except DataError:
                if not skip_bad:
                    raise
                damaged += 1
    return _batch(tokens, targets, np.array([*borders, total], np.int32), padding + damaged, damaged)


def filling(corpus: Corpus) -> int:
    """What stands where there is no token: any id would do, nothing is learnt from it."""
    return corpus.eos if corpus.eos is not None else 0


def _batch(tokens: np.ndarray, targets: np.ndarray, cu_seqlens: np.ndarray, padding: int, damaged: int) -> Batch:
    return Batch(
        torch.from_numpy(tokens).unsqueeze(0),
        torch.from_numpy(targets).unsqueeze(0),
        torch.from_numpy(cu_seqlens),
        padding,
        damaged,
    )
