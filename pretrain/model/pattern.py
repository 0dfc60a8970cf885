"""The layer pattern: which mixer and which FFN each layer has.

`["gdn + moe x3", "attention + moe"]` means three layers with the sublayers named gdn and moe, then one with attention.
A name by itself, `"mamba x24"`, is a layer with that sublayer only.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

_ENTRY = re.compile(r"^\s*([\w.-]+)\s*(?:\+\s*([\w.-]+)\s*)?(?:\s[x*]\s*(\d+))?\s*$")


class Layer(NamedTuple):
    """The names of a layer's sublayers; one of them may be absent."""

    mixer: str | None
    ffn: str | None

    def __str__(self) -> str:
        return " + ".join(name for name in self if name is not None)


def expand(layers: list[str], repeat: int, mixers: list[str], ffns: list[str]) -> list[Layer]:
    """The layers in order.

    Raises ValueError for an entry that cannot be read, for a name that is not defined, naming the nearest defined one, for one
    that means both a mixer and an FFN, and for a pattern without any mixer: such a model could not look at other tokens.
    """
    found: list[Layer] = []
    for entry in layers:
        match = _ENTRY.match(entry)
        if match is None or match.group(3) == "0":
            raise ValueError(
                f"layer entry {entry!r} cannot be read; write 'mixer + ffn', 'mixer + ffn x3' or one name alone"
            )
        first, second, count = match.group(1), match.group(2), int(match.group(3) or 1)
        if second is None:
            _defined(first, [*mixers, *ffns], "the model", entry)
            if first in mixers and first in ffns:
                raise ValueError(f"layer entry {entry!r} means a mixer and an FFN of that name; rename one of them")
            layer = Layer(first, None) if first in mixers else Layer(None, first)
        else:
            _defined(first, mixers, "mixers", entry)
            _defined(second, ffns, "ffns", entry)
            layer = Layer(first, second)
        found += [layer] * count
    if all(layer.mixer is None for layer in found):
        raise ValueError(f"layers = {layers}: no layer has a mixer; add one, such as {mixers[0]!r}")
    return found * repeat


def _defined(name: str, names: list[str], section: str, entry: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"layer entry {entry!r} names {name!r}, but {section} defines only {', '.join(names)}{guess}")
