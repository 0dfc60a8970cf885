"""What a decoder remembers between calls while it generates: two dictionaries a layer, filled by its mixer and its FFN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class LayerCache:
    """mixer: keys and values, recurrent state, convolution tail; ffn: what a contextual FFN knows of earlier tokens."""

    mixer: dict[str, Any] = field(default_factory=dict)
    ffn: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecoderCache:
    """One entry a layer; length: tokens seen."""

    layers: list[LayerCache]
    length: int = 0

    @classmethod
    def empty(cls, layers: int) -> DecoderCache:
        return cls([LayerCache() for _ in range(layers)])

    def bytes(self) -> int:
        """Memory held, in bytes."""
        held = [value for layer in self.layers for part in (layer.mixer, layer.ffn) for value in part.values()]
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
