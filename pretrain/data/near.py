"""Near-duplicate documents: MinHash signatures (Broder 1997) and banded locality-sensitive hashing.

Two documents are near-duplicates if their sets of 5-word runs have a Jaccard similarity of at least the threshold, as 128
minima of each estimate it (standard deviation 3.5 % at 0.8). Every document that is linked to an earlier one, directly
or by a chain of such pairs, goes; the first of a chain stays. The minima are rensa's (R-MinHash, after Dahlgaard,
Knudsen and Thorup, "Fast similarity sketching", 2017); the search for pairs is written here because it has to work on
signatures that lie on disk, in memory that grows by 20 bytes a document, and must find the same pairs whatever
processes and machines made the signatures.

Words are runs of letters and digits, lower case, in NFC; each character of three or more bytes in UTF-8 (Chinese, kana,
Hangul, Indic scripts, emoji) is a word of its own, because such text has few spaces.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.data.errors import UsageError

SLOTS = 128
WORDS = 5
_RECALL = 0.99
_LEADERS = 64
_NEIGHBOURS = 16
_PAIRS = 1 << 14
_ROWS = 1 << 16
_BLOCK = 1 << 20

# Fixed for ever: signatures of different times and machines are compared with each other.
_BASE, _STEP = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # odd, so that they have inverses modulo 2^64
_SEED = 1


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_BYTES = _mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_BASE))

_SEPARATOR, _LETTER, _WIDE, _INNER = range(4)
_KIND = np.zeros(256, np.uint8)
_KIND[[byte for byte in range(128) if chr(byte).isalnum() or chr(byte) == "_"]] = _LETTER
_KIND[0x80:0xC0] = _INNER
_KIND[0xC3:0xE0] = _LETTER  # 0xC2 begins punctuation
_KIND[0xE0:0xF8] = _WIDE


def version() -> str:
    """Names what signatures depend on besides the text: signatures of different versions must not be compared.

    Raises ValueError if rensa is missing.
    """
    return f"rensa {_rensa().RMinHash.ALGORITHM_VERSION}/{SLOTS}/{WORDS}"


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise UsageError("near-duplicates need the rensa package: pip install 'braid[clean]'") from None
    return rensa


def signature(text: str) -> np.ndarray:
    """uint32 [128]: the signature of one document. It depends on the text alone."""
    return signatures([text])[0]


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [documents, 128]: as `signature` of each, quicker for short ones. Raises ValueError if rensa is missing."""
    minhash = _rensa().RMinHash
    found = np.empty((len(texts), SLOTS), np.uint32)
    for first, raws in _batches(texts):
        words, counts = _words_of(raws)
        hashes, offsets = _runs(words, counts, raws)
        rows = minhash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, _SEED).to_rows()
        found[first : first + len(raws)] = rows
    return found


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first, UTF-8 of consecutive documents), about a MiB together."""
    first, size = 0, 0
    batch: list[bytes] = []
    for number, text in enumerate(texts):
        raw = unicodedata.normalize("NFC", text.lower()).encode(errors="surrogatepass")
        if batch and size + len(raw) > _BLOCK:
            yield first, batch
            first, size, batch = number, 0, []
        batch.append(raw)
        size += len(raw)
    if batch:
        yield first, batch


def _words_of(raws: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes of all words of all documents, int64 [documents] number of words of each)."""
    if len(raws) == 1:
        parts = [_hash_words(block)[0] for block in _cuts(raws[0])]
        return np.concatenate(parts), np.array([sum(map(len, parts))])
    hashes, starts = _hash_words(b"\n".join(raws))
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(raw) + 1 for raw in raws])])
    return hashes, np.diff(np.searchsorted(starts, borders))


def _cuts(raw: bytes) -> Iterator[bytes]:
    """A long document in pieces, cut at line breaks or spaces where there are any, so that memory stays bounded."""
    start = 0
    while len(raw) - start > _BLOCK:
        end = max(raw.rfind(b"\n", start, start + _BLOCK), raw.rfind(b" ", start, start + _BLOCK))
        end = start + _BLOCK if end <= start else end
        yield raw[start:end]
        start = end
    yield raw[start:]


def _powers(base: int) -> np.ndarray:
    factors = np.full(2 * _BLOCK, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)  # modulo 2^64


_tables: tuple[np.ndarray, np.ndarray] | None = None


def _hash_words(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hash of each word, int64 byte at which it begins): polynomials modulo 2^64 over random byte values."""
    global _tables
    if _tables is None:
        _tables = _powers(_BASE), _powers(pow(_BASE, -1, 1 << 64))
    powers, inverses = _tables
    data = np.frombuffer(raw, np.uint8)
    kinds = _kinds(data)
    inside = kinds != _SEPARATOR
    begins = inside.copy()
    begins[1:] &= ~inside[:-1] | (data[1:] >= 0xE0) | ((kinds[:-1] == _WIDE) & (data[1:] & 0xC0 != 0x80))
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.uint64), starts
    # Separators count for nothing, so a word may as well reach up to the next.
    terms = _BYTES[data]
    terms *= powers[: len(data)]
    terms[~inside] = 0
    return np.add.reduceat(terms, starts) * inverses[starts], starts


def _kinds(data: np.ndarray) -> np.ndarray:
    """What each byte belongs to: a separator, a letter of a word, or a character that is a word of its own."""
    kinds = _KIND[data]
    if not len(data) or data.max() < 0x80:
        return kinds
    # General punctuation (U+2000 to U+207F) and that of Chinese and Japanese (U+3000 to U+303F).
    lead, second = data[:-1], data[1:]
    marks = ((lead == 0xE2) & ((second == 0x80) | (second == 0x81))) | ((lead == 0xE3) & (second == 0x80))
    kinds[:-1][marks] = _SEPARATOR
    for _ in range(3):  # the bytes inside of a character are what its first byte is
        inner = kinds[1:] == _INNER
        kinds[1:][inner] = kinds[:-1][inner]
    kinds[kinds == _INNER] = _SEPARATOR
    return kinds


def _runs(words: np.ndarray, counts: np.ndarray, raws: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes of runs of words, uint64 [documents + 1] offsets). A shorter document is one run: its whole text."""
    sizes = np.maximum(counts - (WORDS - 1), 0)
    short = np.flatnonzero(sizes == 0)
    offsets = np.zeros(len(counts) + 1, np.uint64)
    np.cumsum(np.maximum(sizes, 1), out=offsets[1:])
    hashes = np.empty(int(offsets[-1]), np.uint64)
    whole = offsets[short].astype(np.int64)
    hashes[whole] = [xxhash.xxh3_64_intdigest(raws[document]) for document in short.tolist()]
    if sizes.any():
        total = len(words) - (WORDS - 1)
        runs = np.zeros(total, np.uint64)
        for place in range(WORDS):
            runs += words[place : place + total] * np.uint64(pow(_STEP, place, 1 << 64))
        # A run that begins among the last words of a document would reach into the next.
        left = np.repeat(np.cumsum(counts), counts)[:total] - np.arange(total)
        others = np.ones(len(hashes), bool)
        others[whole] = False
        hashes[others] = _mixed(runs[left >= WORDS])
    return hashes, offsets


class _Rows:
    """Several arrays of signatures as one, in their order; only rows that are asked for are read."""

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(part) for part in self.parts])])
        assert all(part.shape[1:] == (SLOTS,) and part.dtype == np.uint32 for part in self.parts), "not signatures"

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), SLOTS), np.uint32)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(which).tolist():
            chosen = which == part
            found[chosen] = self.parts[part][rows[chosen] - self.starts[part]]
        return found

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start, part in zip(self.starts.tolist(), self.parts):
            for first in range(0, len(part), _ROWS):
                yield start + first, np.asarray(part[first : first + _ROWS])


def band_rows(threshold: float) -> int:
    """Minima of a band: as many as still find 99 % of the pairs that are just similar enough."""
    return max(
        rows for rows in range(1, SLOTS + 1) if rows == 1 or 1 - (1 - threshold**rows) ** (SLOTS // rows) >= _RECALL
    )


def near_duplicates(
    signatures: np.ndarray | Sequence[np.ndarray], threshold: float = 0.8, scratch: str | Path | None = None
) -> np.ndarray:
    """bool [documents]: true for a document that is linked to an earlier one by near-duplicates, so should be dropped.

    signatures: uint32 [documents, 128] of `signature`, or a sequence of such arrays that follow each other; memory
    maps are read a part at a time. threshold: Jaccard similarity from which on two are near-duplicates, above 0 up to
    1. scratch: folder for a temporary file of 8 bytes a document and band (21 bands at 0.8); memory otherwise.
    A pair that is just similar enough is missed with a chance of 1 %, one at 0.9 practically never; of many
    documents that share a band without being similar, each is compared with 80 others there. Raises ValueError for the threshold.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            f"near-duplicates from a similarity of {threshold}: pass a number above 0 up to 1, such as 0.8"
        )
    rows = _Rows([signatures] if isinstance(signatures, np.ndarray) else signatures)
    labels = np.arange(len(rows), dtype=np.uint32 if len(rows) < 1 << 32 else np.int64)
    least = int(np.ceil(threshold * SLOTS - 1e-9))
    with tempfile.TemporaryFile(dir=scratch) as file:
        for keys in _bands(rows, band_rows(threshold), file if scratch is not None else None):
            _link(rows, _together(keys), labels, least)
    return labels != np.arange(len(rows), dtype=labels.dtype)


def _bands(rows: _Rows, size: int, file: Any) -> Iterator[np.ndarray]:
    """For each band, uint64 [documents]: equal where all its minima are."""
    count = SLOTS // size
    if not len(rows):
        return
    shape = (count, len(rows))
    keys = np.empty(shape, np.uint64) if file is None else np.memmap(file, np.uint64, "w+", shape=shape)
    for first, block in rows.blocks():
        for band in range(count):
            key = np.zeros(len(block), np.uint64)
            for column in range(band * size, (band + 1) * size):
                key = _mixed(key ^ block[:, column].astype(np.uint64))
            keys[band, first : first + len(block)] = key
    yield from keys


def _together(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents, keys) of those that share their key with another: sorted by key, in their order for each."""
    ordered = np.sort(keys)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(repeated):
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    found = []
    for first in range(0, len(keys), _ROWS):
        block = keys[first : first + _ROWS]
        place = np.minimum(np.searchsorted(repeated, block), len(repeated) - 1)
        found.append(first + np.flatnonzero(repeated[place] == block))
    members = np.concatenate(found)
    shared = np.asarray(keys[members])
    order = np.argsort(shared, kind="stable")
    return members[order], shared[order]


def _link(rows: _Rows, together: tuple[np.ndarray, np.ndarray], labels: np.ndarray, least: int) -> None:
    """Joins in `labels`, in place, what is similar among the members of each key."""
    members, keys = together
    # Each with its neighbours: all pairs of a key with few members, and what links a chain.
    for distance in range(1, _NEIGHBOURS + 1):
        near = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(near):
            break
        _join_similar(rows, members[near], members[near + distance], labels, least)
    # All with the first of their key, then those that are unlike it with the first of them, and so on.
    for _ in range(_LEADERS):
        if len(members) < 2:
            return
        first = np.concatenate([[True], keys[1:] != keys[:-1]])
        leaders = members[np.flatnonzero(first)[np.cumsum(first) - 1]]
        _join_similar(rows, leaders[~first], members[~first], labels, least)
        left = _roots(labels, leaders) != _roots(labels, members)
        members, keys = members[left], keys[left]


def _join_similar(rows: _Rows, one: np.ndarray, other: np.ndarray, labels: np.ndarray, least: int) -> None:
    """Links, in place, the pairs that agree in `least` minima; what is linked already is not read."""
    unknown = _roots(labels, one) != _roots(labels, other)
    one, other = one[unknown], other[unknown]
    for start in range(0, len(one), _PAIRS):
        a, b = one[start : start + _PAIRS], other[start : start + _PAIRS]
        similar = (rows[a] == rows[b]).sum(axis=1) >= least
        _join(labels, a[similar], b[similar])


def _roots(labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The first document of what each is linked to. Shortens the way there."""
    found = labels[members]
    while not np.array_equal(above := labels[found], found):
        found = above
    labels[members] = found
    return found


def _join(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Links the documents of each pair, in place: the later root points at the earlier."""
    while len(one):
        a, b = _roots(labels, one), _roots(labels, other)
        apart = a != b
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
