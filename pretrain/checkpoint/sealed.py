"""JSON files that carry their own SHA-256: no bit of the text, white space included, can change unnoticed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pretrain.checkpoint.durable import write_bytes

_BLANK = "0" * 64
_SEAL = re.compile(r'"sha256": "([0-9a-f]{64})"\n?\}\n\Z')


def sealed(value: dict[str, Any], indent: int | None = 1) -> bytes:
    """`value` as JSON with a last key "sha256": the hash of the text with zeros in its place."""
    text = json.dumps({**value, "sha256": _BLANK}, indent=indent) + "\n"
    head, _, tail = text.rpartition(_BLANK)
    return (head + hashlib.sha256(text.encode()).hexdigest() + tail).encode()


def write_sealed(path: Path, value: dict[str, Any], indent: int | None = 1) -> None:
    """Writes `value`, sealed, atomically and durably."""
    write_bytes(path, sealed(value, indent))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` made. Raises ValueError naming the file if anything in it differs, OSError if it cannot be read."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = _SEAL.search(text)
    if found is None:
        raise ValueError(f"{path} is damaged: its end is not as it was written")
    blank = text[: found.start(1)] + _BLANK + text[found.end(1) :]
    if hashlib.sha256(blank.encode()).hexdigest() != found[1]:
        raise ValueError(f"{path} is damaged: it does not fit its own hash")
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def seal(path: Path) -> str:
    """The hash that a sealed file claims; "" if there is none. Whether it is true, reading it tells."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 128))
        found = _SEAL.search(file.read().decode(errors="replace"))
    return found[1] if found else ""
