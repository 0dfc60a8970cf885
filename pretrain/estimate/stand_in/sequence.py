"""The sequence that a traced layer is given: packed sequences of one length, whose operators stand in for the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import delta_rule, gated_linear_attention, short_convolution
from pretrain.estimate.kept import recur
from pretrain.estimate.stand_in.notes import Notes, size
from pretrain.estimate.stand_in.operators import attend, queries_and_keys
from pretrain.model.sequence import SequenceContext


class TracedSequence(SequenceContext):
    """T tokens in `count` packed sequences."""

    def __init__(self, notes: Notes, tokens: int, count: int):
        with notes.memory.paused():
            positions = torch.empty(1, tokens, dtype=torch.int64)
            borders = torch.empty(count + 1, dtype=torch.int32)
        super().__init__(positions, borders)
        self.notes, self.count = notes, count

    def rotary(self, dim: int, theta: float) -> tuple[Tensor, Tensor]:
        with self.notes.memory.paused():
            tables = super().rotary(dim, theta)
        self.notes.shared[dim, theta] = sum(size(table) for table in tables)
        return tables

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        cache: Any = None,
    ) -> Tensor:
        reach = None if window is None else window - 1
        wide = 4.0 * (k.numel() + v.numel())
        self.notes.send("cp", "keys", "keys and values", size(k) + size(v), window=reach, wide=wide)
        return attend(self.notes, q, k, v, scale, window, self.count)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = "silu", cache: Any = None
    ) -> Tensor:
        self._columns(x, weight.shape[1] - 1, "convolution's columns")
        return recur(short_convolution, (x, weight, bias), {"activation": activation}, self.count, self.notes.gpu)

    def recur(self, operator: Any, *inputs: Tensor | None, cache: Any = None, **options: Any) -> Tensor:
        self.notes.send("cp", "tails", "recurrence's states", 2.0 * summary(operator, inputs))
        return recur(operator, inputs, options, self.count, self.notes.gpu)

    def look_back(
        self, operator: Any, x: Tensor, *parameters: Tensor, reach: int, cache: Any = None, **options: Any
    ) -> tuple[Tensor, ...]:
        self._columns(x, reach, "convolutions' columns")
        return queries_and_keys(self.notes, x, *parameters)

    def history(
        self, x: Tensor, reach: int, before: Tensor | None = None, cache: Any = None, name: str = "history"
    ) -> list[Tensor]:
        self._columns(x, reach, "earlier tokens")
        return super().history(x, reach, before, cache, name)

    def total(self, counts: Tensor) -> Tensor:
        self.notes.send("cp", "all_reduce", "loads of sequences", size(counts))
        return counts.clone()

    def _columns(self, x: Tensor, reach: int, what: str) -> None:
        if reach:
            self.notes.send("cp", "tails", what, 2.0 * reach * size(x) / x.shape[1])

    def part(self, ranks: int) -> TracedSequence:
        """For one of the ranks that share out its tokens between sublayers."""
        return _Part(self.notes, self.positions.shape[1] // ranks, self.count)


class _Part(TracedSequence):
    def owners(self) -> tuple[Tensor, int]:
        return torch.empty(self.positions.shape[1], dtype=torch.int64), self.count

    def total(self, counts: Tensor) -> Tensor:
        self.notes.send("tp", "all_reduce", "loads of sequences", size(counts))
        return super().total(counts)


def summary(operator: Any, inputs: Sequence[Tensor | None]) -> int:
    """Bytes by which one span of a recurrence is told to other ranks (parallel/context/recurrences.py): fp32."""
    span = [x if x is None or x.dim() < 3 else x[:, :1] for x in inputs]
    shapes = {name: x.shape for name, x in zip("qkvbgd", span) if x is not None}
    if operator is delta_rule:
        (K,), (HV, V) = shapes["k"][3:], shapes["v"][2:]
        return 4 * HV * K * (V + K)
    if operator is gated_linear_attention:
        (K,), (HV, V) = shapes["k"][3:], shapes["v"][2:]
        gate = span[3]
        return 4 * (HV * K * V + (0 if gate is None else gate.numel()))
    channels, states = shapes["v"]  # of A, the third input of the selective scan
    return 4 * channels * (states + 1)
