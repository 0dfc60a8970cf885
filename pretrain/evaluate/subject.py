"""The model under evaluation with what every task needs, and the log-probabilities of continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.model.decoder import Decoder

LOGIT_BYTES = 1 << 29  # of fp32 logits at a time, about


@dataclass(frozen=True)
class Subject:
    """context: tokens that the model is shown at most. batch: sequences at a time. precision: fp32 or bf16."""

    model: Decoder
    tokenizer: Tokenizer
    context: int
    batch: int = 8
    precision: str = "fp32"

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], on any device -> fp32 [B, T, vocabulary]."""
        with torch.inference_mode(), self._autocast():
            return self.model(tokens.to(self.device))

    def continuation_logits(self, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
        """fp32 [len(continuation), vocabulary]: what the model expects at each place of the continuation.

        The context is read into the cache, so that its logits, which nobody needs, are never made.
        """
        with torch.inference_mode(), self._autocast():
            cache = self.model.new_cache()
            parts = [self.model(self._row(context), cache=cache, last_only=True)]
            if len(continuation) > 1:
                parts.append(self.model(self._row(continuation[:-1]), cache=cache))
            return torch.cat(parts, dim=1)[0]

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class Scored(NamedTuple):
    """log_probability: of the continuation, summed, in nats. greedy: whether always taking the likeliest token writes it."""

    log_probability: float
    greedy: bool


def judge(logits: Tensor, continuation: Tensor, vocabulary: int | None = None) -> Scored:
    """logits [C, V] at the places of the continuation int64 [C]. vocabulary: ids that may be written; others are padding."""
    own = logits.log_softmax(dim=-1).gather(-1, continuation[:, None]).double().sum()
    return Scored(float(own), bool((logits[:, :vocabulary].argmax(dim=-1) == continuation).all()))


Pair = tuple[Sequence[int], Sequence[int]]


def score_continuations(
    subject: Subject, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda count: None
) -> list[Scored]:
    """Scores each (context, continuation), both token ids and neither empty; in the order given.

    Of a pair longer than subject.context the beginning is dropped (a continuation longer than that is refused). advance: told
    how many more pairs are done.
    """
    rows = []
    for context, continuation in pairs:
        assert context and continuation, "both parts need a token"
        if len(continuation) > subject.context:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the context of {subject.context}; "
                f"use --context {len(continuation)} or more"
            )
        kept = [*context, *continuation][-(subject.context + 1) :]
        rows.append((kept[:-1], kept[-len(continuation) :]))
    results: list[Scored | None] = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    vocabulary, known = subject.model.embedding.weight.shape[0], subject.tokenizer.vocabulary_size
    start = 0
    while start < len(by_length):
        longest = len(rows[by_length[start]][0])
        together = min(subject.batch, LOGIT_BYTES // (4 * vocabulary * longest))
        group = by_length[start : start + max(1, together)]
        if together:
            inputs = torch.zeros(len(group), longest, dtype=torch.int64)
            for place, i in enumerate(group):  # filled up on the right, where no scored token can see it
                inputs[place, : len(rows[i][0])] = torch.tensor(rows[i][0])
            logits = subject.logits(inputs)
        for place, i in enumerate(group):
            row, continuation = rows[i]
            if together:
                own = logits[place, len(row) - len(continuation) : len(row)]
            else:
                own = subject.continuation_logits(row[: len(row) - len(continuation) + 1], continuation)
            results[i] = judge(own, torch.tensor(continuation, device=own.device), known)
        advance(len(group))
        start += len(group)
    return [result for result in results if result is not None]
