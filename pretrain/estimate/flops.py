"""FLOPs of a training step, by the model's own count of its matrix products and recurrences."""

from __future__ import annotations

from pretrain.model.decoder import Decoder


def training_flops_per_token(model: Decoder, context: float) -> float:
    """Forward plus backward FLOPs for one token that sees `context` keys on average.

    The backward pass of a product costs two products. Recomputed activations are not counted: MFU measures useful work.
    """
    return 3.0 * model.flops_per_token(context)


def mean_context(lengths: list[int]) -> float:
    """Mean number of keys that a token of causal sequences of these lengths sees, itself included."""
    tokens = sum(lengths)
    return sum(length * (length + 1) / 2 for length in lengths) / tokens if tokens else 0.0
