"""Overlapping windows over documents: every token is scored exactly once, with as much context as the stride leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.batch import IGNORE, Batch


class Window(NamedTuple):
    """The model reads tokens [start, end) and predicts (start, end]; those after `scored` count, the others are context."""

    start: int
    end: int
    scored: int


def windows(targets: int, context: int, stride: int) -> Iterator[Window]:
    """Covers `targets` + 1 tokens, of which the first is given.

    A first window of `context` targets, then windows that end `stride` tokens further on: each has `context` tokens, and a
    token that counts sees at least context - stride + 1 of them (fewer only at the beginning of the document). stride = context
    never reads a token twice; stride = 1 gives every token the whole context, at `context` times the cost.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride} is not between 1 and the context of {context}; tokens would be left out")
    done = 0
    while done < targets:
        end = min(done + (stride if done else context), targets)
        yield Window(max(0, end - context), end, done)
        done = end


def cost(targets: int, context: int, stride: int) -> int:
    """Tokens that the model reads for a document of `targets` + 1 tokens."""
    return sum(window.end - window.start for window in windows(targets, context, stride))


def batches(documents: Iterable[Sequence[int] | np.ndarray], context: int, stride: int, rows: int) -> Iterator[Batch]:
    """Packs the windows of all documents into batches of at most rows * context tokens; no window sees another."""
    packed: list[tuple[torch.Tensor, torch.Tensor]] = []
    size = 0
    for document in documents:
        ids = torch.as_tensor(np.asarray(document, dtype=np.int64))
        for window in windows(len(ids) - 1, context, stride):
            tokens, targets = ids[window.start : window.end], ids[window.start + 1 : window.end + 1].clone()
            targets[: window.scored - window.start] = IGNORE
            if size + len(tokens) > rows * context:
                yield _pack(packed)
                packed, size = [], 0
            packed.append((tokens, targets))
            size += len(tokens)
    if packed:
        yield _pack(packed)


def _pack(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    borders = np.cumsum([0, *(len(tokens) for tokens, _ in parts)]).astype(np.int32)
    tokens, targets = (torch.cat(column)[None] for column in zip(*parts))
    return Batch(tokens, targets, torch.from_numpy(borders))
