"""What a decoder remembers between calls while it generates: two dictionaries a layer, filled by its mixer and its FFN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BY_TOKEN = (
    "k",
    "v",
    "latent",
)  # entries [B, T, ...] that hold something of every token; all others are one row a sequence


@dataclass
class LayerCache:
    """mixer: keys and values, recurrent state, convolution tail; ffn: what a contextual FFN knows of earlier tokens."""

    mixer: dict[str, Any] = field(default_factory=dict)
    ffn: dict[str, Any] = field(default_factory=dict)

    def split(self, borders: list[int]) -> list[LayerCache]:
        return [LayerCache(_of(self.mixer, borders, i), _of(self.ffn, borders, i)) for i in range(len(borders) - 1)]


def _of(held: dict[str, Any], borders: list[int], i: int) -> dict[str, Any]:
    """What belongs to the i-th of the packed sequences."""
    number = len(borders) - 1
    own: dict[str, Any] = {}
    for name, value in held.items():
        if name in BY_TOKEN:
            own[name] = value[:, borders[i] : borders[i + 1]].clone()
        elif isinstance(value, Tensor):
            # Rows are the sequences, or one block of rows a sub-module with the sequences in it.
            own[name] = value.unflatten(0, (-1, number))[:, i].clone()
        else:
            raise TypeError(f"cache entry {name} is a {type(value).__name__}, which cannot be told apart by sequence")
    return own


@dataclass
class DecoderCache:
    """One entry a layer; length: tokens seen. borders: of the packed prompts that it was filled with, if it was."""

    layers: list[LayerCache]
    length: int = 0
    borders: Tensor | None = None

    @classmethod
    def empty(cls, layers: int) -> DecoderCache:
        return cls([LayerCache() for _ in range(layers)])

    def split(self) -> list[DecoderCache]:
        """One cache for each of the packed prompts, which then go on by themselves."""
        if self.borders is None:
            raise ValueError("this cache was not filled from packed prompts (cu_seqlens)")
        borders = self.borders.tolist()
        layers = zip(*(layer.split(borders) for layer in self.layers), strict=True)
        lengths = self.borders.diff().tolist()
        return [DecoderCache(list(own), length) for own, length in zip(layers, lengths, strict=True)]

    def bytes(self) -> int:
        """Memory held, in bytes."""
        held = [value for layer in self.layers for part in (layer.mixer, layer.ffn) for value in part.values()]
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
