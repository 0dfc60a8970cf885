"""A call's tensors by token and head, and what every gate must say about a segment of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.gated_linear_attention.plan import Plan


@dataclass(frozen=True)
class Operands:
    """q, k [tokens, H / repeat, K]; v [tokens, H R, V]; g [tokens, H R] or [tokens, H R, K] or None.

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
        return self.q.shape[2]

    @property
    def V(self) -> int:
        return self.v.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int, int, int]:
        """Of states, sorted sequences or chunks first."""
        return -1, self.H, self.K, self.R, self.V

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

    def of_values(self, x: Tensor) -> Tensor:
        """[m H, ...] -> [m H R, ...], the same for each value head."""
        return x if self.R == 1 else x.repeat_interleave(self.R, dim=0)

    def sum_values(self, x: Tensor) -> Tensor:
        """[m H R, ...] -> [m H, ...]."""
        return x if self.R == 1 else x.unflatten(0, (-1, self.R)).sum(1)


def decay_factor(exponent: Tensor) -> Tensor:
    """exp in place, zero below 1e-26 (fp32) or 1e-130 (fp64).

    A fading product of such factors passes through denormal numbers, on which matrix products run ten times slower. What is
    cut is lost in rounding anyway: a token's own contribution carries the factor 1.
    """
    least = -300.0 if exponent.dtype == torch.float64 else -60.0
    return torch.threshold_(exponent, least, -torch.inf).exp_()


class Decay(Protocol):
    """The decay of one segment of chunks. G: cumulative log decay inside a chunk, own token included; S: state at its start.

    The products with the state are taken between scaled operands,
        W  = key(K)ᵀ value(V)            written to the state:   S' = total S + half W
        o  = output(query(Q) (half S))   read from it
    and `factored` says whether the part inside the chunk is a plain causal product of the same scaled operands. If it is not,
    `scores` and `scores_backward` give that part from the operands as they are.
    """

    @property
    def factored(self) -> bool: ...

    @property
    def half(self) -> Tensor | None:
        """Broadcasts against [m, H, K, R, V]; None stands for 1, and then `total` too if there is no gate."""
        ...

    @property
    def total(self) -> Tensor | None: ...

    def query(self, x: Tensor) -> Tensor: ...

    def key(self, x: Tensor) -> Tensor: ...

    def value(self, x: Tensor) -> Tensor: ...

    def output(self, x: Tensor) -> Tensor: ...

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[m H R, C, C], what o takes from each value; zero above the diagonal."""
        ...

    def scores_backward(self, scores: Tensor, dscores: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk [m H, C, K] and the gate's gradient, from scores and their gradient, both without their diagonals."""
        ...

    def gradient_inside(
        self, scores: Tensor, dscores: Tensor, query: Tensor, dquery: Tensor, key: Tensor, dkey: Tensor
    ) -> Tensor:
        """The same gate's gradient where factored. dquery and dkey are those through the scores alone."""
        ...

    @property
    def own_score(self) -> float:
        """Turns the diagonal of query keyᵀ into a token's score for itself, where factored."""
        ...

    @property
    def own_dscore(self) -> float:
        """Turns the diagonal of output(dO) value(V)ᵀ into the factor of k in dq (and of q in dk), where factored."""
        ...

    def per_gate(self, product: Tensor) -> Tensor:
        """Sum of [M, C, K or V] over what shares a gate: [M, C] or unchanged."""
        ...

    def past(self, product: Tensor) -> Tensor:
        """Σ of S ⊙ dS over what shares a gate, decayed by a whole chunk, from half S ⊙ half dS: [m H R] or [m H, K]."""
        ...
