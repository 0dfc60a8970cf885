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


class Utilization:
    """Share of a chip's nominal speed that training reaches: model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B)."""

    def __init__(self, nominal: float | None, source: str):
        """nominal: FLOP/s of the chip, None where nobody knows. source: where that comes from, for messages."""
        self.nominal, self.source = nominal, source
        self.warned = False

    def of(self, speed: float) -> tuple[float | None, str | None]:
        """FLOP/s of useful work -> (the share, None or a warning).

        No chip is faster than its datasheet: a share above 1 means that the file is another chip's, or that it lists another
        precision. Such a number is not given out, for it would be believed; and it ends no run, for training is none the worse.
        The warning comes once.
        """
        if self.nominal is None:
            return None, None
        if speed <= self.nominal:
            return speed / self.nominal, None
        first, self.warned = not self.warned, True
        text = (
            f"WARNING: {speed / 1e12:.4g} TFLOP/s of useful work is more than the {self.nominal / 1e12:.4g} TFLOP/s that "
            f"{self.source} says the chip can do: mfu is not logged; give the file of this chip and precision (hardware=...)"
        )
        return None, text if first else None
