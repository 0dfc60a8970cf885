"""A hash inside of a SentencePiece .model, so that a damaged file is refused wherever it lies.

The file is a protobuf message, whose readers pass over fields that they do not know. The seal is two such fields (numbers 7740
and 7741, in the range that the format leaves to extensions): a mark at the beginning, and at the end the mark with the xxh3_128
of all bytes before it. Without it a flipped bit in a piece or a score goes unnoticed: the file loads, and some texts get other
ids; so does a file that ends too early, between two pieces.
"""

from __future__ import annotations

import xxhash

_MARK = b"braid-xxh3"


def _head(number: int, size: int) -> bytes:
    """How a field of bytes begins: its number and kind (2) in groups of 7 bits, and its size."""
    tag = number << 3 | 2
    return bytes([tag & 0x7F | 0x80, tag >> 7 & 0x7F | 0x80, tag >> 14, size])


_FRONT = _head(7740, len(_MARK)) + _MARK
_END = _head(7741, len(_MARK) + 16) + _MARK
_SIZE = len(_END) + 16


def seal(model: bytes) -> bytes:
    """The model with its hash."""
    marked = _FRONT + model
    return marked + _END + xxhash.xxh3_128_digest(marked)


def sealed(raw: bytes) -> bool | None:
    """Whether the hash in a file fits its bytes; None if it has none. No damage to one place makes a sealed file one without."""
    front, end = raw[: len(_FRONT)], raw[-_SIZE:-16]
    if front != _FRONT and end != _END:
        return None
    return end == _END and xxhash.xxh3_128_digest(raw[:-_SIZE]) == raw[-16:]
