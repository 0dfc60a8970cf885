"""The selected (token, expert) pairs of a union as rows, and products with each expert's own matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

# On CPUs half-precision products compile a kernel for each new shape; rounding the rows up keeps the shapes few.
ALIGN = 64


@dataclass(frozen=True)
class Rows:
    """P pairs sorted by expert, then by token.

    token: int64 [P]. expert: int64 [P]. counts: pairs of each expert. order: int64 [P], the rows sorted by token instead;
    starts: int64 [N], where each token's rows begin in it.
    """

    token: Tensor
    expert: Tensor
    counts: list[int]
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """mask: bool [N, n]."""
        expert, token = mask.T.nonzero(as_tuple=True)
        place = mask.T.flatten().cumsum(0).view(mask.T.shape) - 1
        each = mask.sum(1)
        return cls(token, expert, mask.sum(0).tolist(), place.T[mask], each.cumsum(0) - each)

    def of_tokens(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [P, ...]."""
        return x.index_select(0, self.token)

    def of_pairs(self, x: Tensor) -> Tensor:
        """x [N, n] -> [P]."""
        return x[self.token, self.expert]

    def combine(self, rows: Tensor) -> Tensor:
        """[P, D] -> [N, D], the sum of each token's rows, 0 for a token without any. A gather: a fixed order, no atomics."""
        return embedding_bag(self.order, rows, self.starts, mode="sum")


def per_expert(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """rows [P, I] sorted by expert, weight [n, I, O] -> [P, O] in the rows' dtype."""
    align = ALIGN if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16) else 1
    pieces = []
    # unbind has one backward for all experts; indexing would write a gradient of the whole stack for each.
    for piece, matrix in zip(rows.split(counts), weight.to(rows.dtype).unbind()):
        count = piece.shape[0]
        pieces.append((pad(piece, (0, 0, 0, -count % align)) @ matrix)[:count])
    return torch.cat(pieces)
