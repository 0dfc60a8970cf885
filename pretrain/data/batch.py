"""One packed micro-batch, and how spans of documents become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.data.order import Span

if TYPE_CHECKING:
    from pretrain.data.store import Corpus

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Several windows packed into one row of N tokens.

    tokens: int64 [1, N]. targets: int64 [1, N], the next token of the same document, -100 where there is none (a
    document's last token, padding). cu_seqlens: int32 [S + 1], ascending from 0 to N, a border at each document start
    and each window start: nothing may be carried across one.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor

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
        """The same batch on another device."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
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
