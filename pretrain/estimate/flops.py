"""FLOPs: the one count behind metrics (MFU), --dry-run and plans, from what each sublayer says of itself.

A multiply-add counts 2. Kinds that are kept apart:

useful      every matrix product and every recurrence by its definition, forward and backward (a product's backward is two), of
            documents that have something to predict: MFU
idle        the same, of what fills rows up
recomputed  what activation checkpointing computes once more
remade      what fused kernels do not keep and make once more in their backward pass: attention's scores
update      the optimizer's own products: Muon's Newton-Schulz iterations (update.py)

Element-wise work (norms, activations, AdamW) is not counted: memory bounds it. Attention is counted inside each document of a
packed row, causal and within its window. The fused loss makes its gradients while the logits are there, so training computes
no logits twice. Kernels that work through a recurrence in chunks do more than its definition, which no count here contains, nor
rows of experts that are filled up, nor scores behind a mask that a kernel computes all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.model.decoder import Decoder
from pretrain.model.sublayer import Sublayer

Documents = tuple[tuple[int, float], ...]
"""(length, how many) of the documents of packed rows; a rank may have a share of them."""


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, as the module says."""

    useful: float
    idle: float = 0.0
    recomputed: float = 0.0
    remade: float = 0.0
    update: float = 0.0

    @property
    def hardware(self) -> float:
        """All that a device computes."""
        return self.useful + self.idle + self.recomputed + self.remade + self.update


class Forward(NamedTuple):
    """FLOPs of a forward pass. Of these, attention: of scores and of the values' sums; remade: as the module says; fixed: of
    products with matrices that are not trained."""

    every: float
    attention: float = 0.0
    remade: float = 0.0
    fixed: float = 0.0

    @property
    def training(self) -> float:
        """Forward and backward: a product has a gradient for each factor, but for matrices that are not trained."""
        return 3.0 * self.every - self.fixed

    def times(self, count: float) -> Forward:
        return Forward(*(count * each for each in self))

    @classmethod
    def sum(cls, each: Iterable[Forward]) -> Forward:
        """Of one pass after the other."""
        return cls(*map(sum, zip(*each, strict=True))) if (each := tuple(each)) else cls(0.0)


def documents(lengths: Iterable[int]) -> Documents:
    return tuple(sorted(Counter(lengths).items()))


def keys(length: int, window: int | None = None) -> float:
    """Mean number of keys that a token of a causal sequence sees, itself included."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def per_token(part: Sublayer, length: int) -> Forward:
    """Of a mixer or FFN, for one token of a document of so many, on average."""
    every = part.flops_per_token(keys(length, getattr(part, "window", None)))
    attention = _attention(part, length, every)
    score = getattr(part, "head_dim", 1) + getattr(part, "shared_dim", 0)
    value = getattr(part, "value_dim", getattr(part, "head_dim", 1))
    remade = attention * score / (score + value)
    return Forward(every, attention, remade, _fixed(part))


def _attention(part: Sublayer, length: int, every: float) -> float:
    """FLOPs of scores and of the values' sums: what grows with the number of keys."""
    alone = part.flops_per_token(0.0)
    routing = getattr(part, "routing", None)
    if routing is not None:  # the share of tokens that it computes may depend on the length, too
        router = routing.flops_per_token()
        alone = router + (alone - router) * routing.share(keys(length)) / routing.share(0.0)
    return max(0.0, every - alone)


def _fixed(part: Sublayer) -> float:
    """FLOPs of products with matrices that stay as they were drawn: buffers, and parameters without gradients."""
    fixed = [
        *(p for p in part.parameters() if not p.requires_grad),
        *(b for b in part.buffers() if b.is_floating_point()),
    ]
    return sum(2.0 * matrix.numel() for matrix in fixed if matrix.dim() >= 2)


def model_per_token(model: Decoder, length: int) -> Forward:
    """Of a whole model, the head included, for one token of a document of so many, on average."""
    around = model.flops_per_token(0.0) - sum(part.flops_per_token(0.0) for part in model.sublayers())
    return Forward.sum([Forward(around), *(per_token(part, length) for part in model.sublayers())])
