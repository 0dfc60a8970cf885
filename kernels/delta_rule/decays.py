"""Decays inside a chunk, by doubling.

Every factor here is a product of step decays alpha = exp(g) <= 1 over a run of neighbouring steps. Nothing is divided
and no exponent is a difference of sums, so nothing overflows, a decay of 0 (g = -inf) is exact, and relative precision
survives an erasing step in the middle of a chunk, where cumulative sums of g would have lost it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Decays:
    """Decays within each chunk, of each channel."""

    alpha: Tensor  # [M, C, K] one step's
    from_start: Tensor  # [M, C, K] from before the chunk through the step
    to_end: Tensor  # [M, C, K] after the step to the end of the chunk

    @property
    def whole(self) -> Tensor:
        """[M, K, 1] over the chunk."""
        return self.from_start[:, -1, :, None]


def lower_blocks(x: Tensor, s: int) -> Tensor:
    """x [..., C, C] -> view [..., C / 2s, s, s] of the squares of size s under the diagonal."""
    return (
        x.unflatten(-2, (-1, 2, s))
        .unflatten(-1, (-1, 2, s))
        .select(-2, 0)
        .select(-4, 1)
        .diagonal(dim1=-4, dim2=-2)
        .movedim(-1, -3)
    )


def doubling(alpha: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (s, prefix, suffix) for s = 1, 2, 4 .. C, for alpha [M, C, D].

    prefix, suffix [M, C, D]: the decay from the start of the run of s tokens through the token; after the token to the
    end of the run. They are overwritten as the iterator goes on.
    """
    prefix, suffix, s, C = alpha.clone(), torch.ones_like(alpha), 1, alpha.shape[1]
    yield s, prefix, suffix
    while s < C:
        before, after = prefix.unflatten(1, (-1, 2, s)), suffix.unflatten(1, (-1, 2, s))
        after[:, :, 0] *= before[:, :, 1, -1:]
        before[:, :, 1] *= before[:, :, 0, -1:]
        s *= 2
        yield s, prefix, suffix


def runs(x: Tensor, s: int, odd: int) -> Tensor:
    """x [..., C, D] -> view [..., C / 2s, s, D] of its odd (1) or even (0) runs of s tokens."""
    return x.unflatten(-2, (-1, 2, s)).select(-3, odd)


def chunk_decays(alpha: Tensor) -> Decays:
    """alpha [M, C, K] -> the decays within each chunk."""
    *_, (_, prefix, suffix) = doubling(alpha)
    return Decays(alpha, prefix, suffix)
