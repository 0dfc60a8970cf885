"""What a decoder remembers between calls while it generates: one dictionary a layer, filled by that layer's mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class DecoderCache:
    """layers: keys and values for attention, recurrent state and convolution tail for linear mixers; length: tokens seen."""

    layers: list[dict[str, Any]]
    length: int = 0

    @classmethod
    def empty(cls, layers: int) -> DecoderCache:
        return cls([{} for _ in range(layers)])

    def bytes(self) -> int:
        """Memory held, in bytes."""
        held = [value for layer in self.layers for value in layer.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
