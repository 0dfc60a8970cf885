"""The layer pattern: which mixer and which FFN each layer has.

`["gdn + moe x3", "attention + moe"]` means three layers with the sublayers named gdn and moe, then one with attention.
"""

from __future__ import annotations

import difflib
import re

_ENTRY = re.compile(r"^\s*([\w.-]+)\s*\+\s*([\w.-]+)\s*(?:x\s*(\d+))?\s*$")


def expand(layers: list[str], repeat: int, mixers: list[str], ffns: list[str]) -> list[tuple[str, str]]:
    """(mixer name, FFN name) for each layer.

    Raises ValueError for an entry that cannot be read or a name that is not defined, naming the nearest defined one.
    """
    pairs: list[tuple[str, str]] = []
    for entry in layers:
        match = _ENTRY.match(entry)
        if match is None:
            raise ValueError(f"layer entry {entry!r} cannot be read; write 'mixer + ffn' or 'mixer + ffn x3'")
        mixer, ffn, count = match.group(1), match.group(2), int(match.group(3) or 1)
        _defined(mixer, mixers, "mixers", entry)
        _defined(ffn, ffns, "ffns", entry)
        pairs += [(mixer, ffn)] * count
    return pairs * repeat


def _defined(name: str, names: list[str], section: str, entry: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"layer entry {entry!r} names {name!r}, but {section} defines only {', '.join(names)}{guess}")
