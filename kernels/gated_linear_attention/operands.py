"""A call's tensors as rows of tokens times heads, and the two things that every gate must say about a segment of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.gated_linear_attention.plan import Plan, Segment


@dataclass(frozen=True)
class Operands:
    """q, k [tokens * heads, K]; v [tokens * H * R, V]; g [tokens * H * R] or [tokens * H * R, K] or None.

    H heads carry a state of R * V columns each. R value heads share a query-key head where the decay is one number a head (it
    then goes with the values); with a decay a channel every value head needs its own scaled q and k, so that R = 1 there
    and q and k are fetched `repeat` times.
    """

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    H: int
    R: int
    repeat: int
    scale: float
    compute: torch.dtype  # of matmul operands
    wide: torch.dtype  # of gates and states
    size: int  # chunks a segment

    @property
    def K(self) -> int:
        return self.q.shape[1]

    @property
    def V(self) -> int:
        return self.v.shape[1]

    @property
    def state_shape(self) -> tuple[int, int, int, int, int]:
        """Of states, sorted sequences or chunks first."""
        return -1, self.H, self.K, self.R, self.V

    def key_rows(self, segment: Segment) -> Tensor:
        """Rows of q and k for the heads of the state: int64 [m, H, C]."""
        rows = segment.rows(self.H // self.repeat)
        return rows if self.repeat == 1 else rows.repeat_interleave(self.repeat, dim=1)

    def fetch(self, segment: Segment, x: Tensor, rows: Tensor) -> Tensor:
        """[m heads, C, D] in the dtype of matmul operands."""
        return segment.fetch(x, rows).flatten(0, 1).to(self.compute)

    def fold(self, x: Tensor) -> Tensor:
        """[m H R, C, V] -> [m H, C, R V]."""
        if self.R == 1:
            return x
        return x.view(-1, self.R, x.shape[1], self.V).transpose(1, 2).reshape(-1, x.shape[1], self.R * self.V)

    def unfold(self, x: Tensor) -> Tensor:
        """[m H, C, R V] -> [m H R, C, V]."""
        if self.R == 1:
            return x
        return x.view(-1, x.shape[1], self.R, self.V).transpose(1, 2).reshape(-1, x.shape[1], self.V)


class Decay(Protocol):
    """The decay of one segment of chunks. G: cumulative log decay inside a chunk, own token included; S: state at its start.

    The products with the state are taken between scaled operands,
        W  = key(K)ᵀ value(V)            written to the state:   S' = total S + half W
        o  = output(query(Q) (half S))   read from it
    and `factored` says whether the part inside the chunk is a plain causal product of the same scaled operands. If it is not,
    `scores` and `scores_backward` give that part from the operands as they are.
    """

    factored: bool
    half: Tensor | None  # broadcasts against [m, H, K, R, V]; None: 1
    total: Tensor | None

    def query(self, x: Tensor) -> Tensor: ...

    def key(self, x: Tensor) -> Tensor: ...

    def value(self, x: Tensor) -> Tensor: ...

    def output(self, x: Tensor) -> Tensor: ...

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[m H R, C, C], what o takes from each value; zero above the diagonal."""
        ...

    def scores_backward(self, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """dq, dk [m H, C, K]."""
        ...

    def gate_gradient(
        self, q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, o: Tensor, do: Tensor, v: Tensor, dv: Tensor
    ) -> Tensor:
        """Gradient of G: [m H R, C] or [m H R, C, K]."""
        ...

    def at_boundary(self, start: Tensor, dstate: Tensor, chunks: slice) -> Tensor:
        """S·dS at chunk starts for the dims of the gate: [n, H, R] or [n, H, K], from half S and dS [n, H, K, R, V]."""
        ...
