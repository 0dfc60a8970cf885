"""From a chunk's logits to its losses, and in place to the logits' gradient, in plain torch.

What the loss needs of a row of logits are four numbers: the largest, the sum of exponentials relative to it, the target's logit
and, with label smoothing, the sum of all. Where ranks share out the vocabulary each has these of its own rows, one gathering
brings them together (Shoeybi et al., arXiv:1909.08053, section 3, in one exchange), and each rank finishes its own logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.common.exponential import exp_

BLOCK_LOGITS = 1 << 18  # logits in fp32 at a time on a CPU: 1 MiB, half of a core's second-level cache


@dataclass(frozen=True)
class Terms:
    """Of the loss; see kernels.cross_entropy.linear_cross_entropy."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Shard:
    """The part of a vocabulary that this rank has, rows first, first + 1, ... of `vocabulary`.

    gather: [P, 4, C], this rank's numbers of each token -> those of all ranks, [Q, 4, C] in any order. The only exchange.
    """

    first: int
    vocabulary: int
    gather: Callable[[Tensor], Tensor]


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of losses and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log partition function, target's logit, sum of logits), each [C], from the numbers of all parts [P, 4, C]."""
    top = parts[:, 0].amax(0)
    total = (parts[:, 1] * (parts[:, 0] - top).exp()).sum(0)
    return top + total.log(), parts[:, 2].sum(0), parts[:, 3].sum(0)


class TokenLosses(Protocol):
    """What a form of this operator is: a chunk's logits to its losses."""

    def __call__(
        self,
        logits: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: Tensor,
        terms: Terms,
        learn: bool,
        shard: Shard | None = None,
    ) -> Tensor:
        """Losses [C], fp32 or wider, of logits [C, V]; overwrites the logits, with factor [C] times the gradient in them if
        `learn`.

        targets: int64 [C], rows of the whole vocabulary. With a shard, targets of other ranks fall outside this rank's V rows.
        """
        ...


def token_losses(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor,
    terms: Terms,
    learn: bool,
    shard: Shard | None = None,
) -> Tensor:
    """See TokenLosses."""
    C, V = logits.shape
    wide, smooth = wide_dtype(logits), terms.label_smoothing
    bias = None if bias is None else bias.to(wide)
    here = None
    if shard is not None:
        targets = targets - shard.first
        here = (targets >= 0) & (targets < V)
        targets = torch.where(here, targets, 0)
    at_target = torch.arange(C, device=logits.device) * V + targets
    hit = logits.view(-1)[at_target].to(wide)
    if bias is not None:
        hit += bias[targets]
    parts = torch.zeros(1, 4, C, dtype=wide, device=logits.device)
    parts[0, 2] = hit if here is None else torch.where(here, hit, 0.0)
    lse = torch.empty(C, dtype=wide, device=logits.device)
    # A few rows at a time, so that the passes over them stay in a core's cache; wide logits are worked on in place.
    height = max(1, BLOCK_LOGITS // V if logits.device.type == "cpu" else C)
    block = None if logits.dtype == wide else torch.empty(min(height, C), V, dtype=wide, device=logits.device)
    slices = [slice(a, min(a + height, C)) for a in range(0, C, height)]
    for rows in slices:
        z = _widened(logits[rows], block, bias)
        if smooth:
            parts[0, 3, rows] = z.sum(-1)
        top = z.amax(-1, keepdim=True)
        total = exp_(z.sub_(top)).sum(-1, keepdim=True)
        parts[0, 0, rows], parts[0, 1, rows] = top[:, 0], total[:, 0]
        if shard is None:
            lse[rows] = (top + total.log()).squeeze(-1)
            if learn:
                z.mul_((1 + 2 * terms.z_loss * lse[rows, None]) * factor[rows, None] / total)
                _store(z, logits[rows], block, factor[rows], smooth / V)
    vocabulary, spread = V, parts[0, 3]
    if shard is not None:
        vocabulary = shard.vocabulary
        lse, hit, spread = merge(shard.gather(parts))
        for rows in slices if learn else ():
            if block is None:  # here lie the exponentials already
                z = logits[rows].mul_((parts[0, 0, rows, None] - lse[rows, None]).exp())
            else:
                z = exp_(_widened(logits[rows], block, bias).sub_(lse[rows, None]))
            z.mul_((1 + 2 * terms.z_loss * lse[rows, None]) * factor[rows, None])
            _store(z, logits[rows], block, factor[rows], smooth / vocabulary)
    if learn:
        # The target's own entry is taken anew in fp32, for p - 1 would cancel after p has been rounded. Each row has one
        # target, so nothing collides.
        own = (hit - lse).exp() * (1 + 2 * terms.z_loss * lse) - (1 - smooth + smooth / vocabulary)
        entry = (own * factor).to(logits.dtype)
        flat = logits.view(-1)
        flat[at_target] = entry if here is None else torch.where(here, entry, flat[at_target])
    losses = lse - (1 - smooth) * hit + terms.z_loss * lse.square()
    return losses - smooth / vocabulary * spread if smooth else losses


def _widened(low: Tensor, block: Tensor | None, bias: Tensor | None) -> Tensor:
    z = low if block is None else block[: low.shape[0]].copy_(low)
    return z if bias is None else z.add_(bias)


def _store(z: Tensor, low: Tensor, block: Tensor | None, factor: Tensor, even: float) -> None:
    """Takes the evenly spread share off the gradient z, and brings it to where the logits were."""
    if even:
        z.sub_(factor[:, None] * even)
    if block is not None:
        low.copy_(z)
