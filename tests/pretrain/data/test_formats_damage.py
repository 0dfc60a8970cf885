"""Damaged pairs: refused with the file and the place in it, never read as something else."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import Corpus, DataError, Loader
from pretrain.data import index as formats
from pretrain.data import manifest as manifests
from pretrain.data.index import HEADER_BYTES, IndexHeader, read_index
from pretrain.data.inspect import verify
from pretrain.data.writer import PairWriter

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
COUNTS = [1, 1, 2, 1, 3, 1, 1, 1, 1, 1]
S, D = len(LENGTHS), len(COUNTS) + 1
POINTERS = HEADER_BYTES + 4 * S
BORDERS = POINTERS + 8 * S


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A prefix: ten documents of thirteen sequences, uint16."""
    with PairWriter(tmp_path / "pair", np.uint16) as writer:
        writer.add(np.arange(sum(LENGTHS)), LENGTHS, COUNTS)
    return tmp_path / "pair"


def refused(prefix: Path) -> str:
    """The message with which a pair is refused; it names a file and does not change it."""
    with pytest.raises(DataError) as caught:
        read_index(prefix)
    message = str(caught.value)
    assert f"{prefix}.idx" in message or f"{prefix}.bin" in message
    assert "copy the file again from its source, or rebuild it" in message or "prepare it again" in message
    return message


def patch(path: Path, offset: int, raw: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)


HEADER = [
    (0, b"\x00", "is not a Megatron index: its first 9 bytes are b'\\\\x00MIDIDX"),
    (8, b"\x01", "is not a Megatron index"),
    (9, b"\x03", "has index version 3 at byte 9, only version 1 is known"),
    (16, b"\x80", "has index version 9223372036854775809 at byte 9"),
    (17, b"\x00", r"has dtype code 0 at byte 17, expected one of \[1, 2, 3, 4, 5, 8\]"),
    (17, b"\x06", "has dtype code 6 at byte 17: float64, which are not token ids"),
    (17, b"\x07", "has dtype code 7 at byte 17: float32, which are not token ids"),
    (17, b"\x09", "has dtype code 9 at byte 17"),
    (17, b"\x04", "sequence 1 points to byte 6 of the .bin, where it overlaps its predecessors, which end at 12"),
    (17, b"\x01", "sequence 1 points to byte 6 of the .bin, but its predecessors end at 3, and what lies between"),
    (18, struct.pack("<Q", S + 1), "is truncated: expected 290 bytes .header, 14 sequences, 11 borders., found 278"),
    (18, struct.pack("<Q", S - 2), "is too long: expected 254 bytes"),
    # As long as an index of 12 sequences that have modes: its columns tell that it is none.
    (18, struct.pack("<Q", S - 1), "sequence 0 points to byte 9 of the .bin, but its predecessors end at 0"),
    (18, struct.pack("<Q", 2**63), "is truncated: expected 110680464442257309818 bytes"),
    (26, struct.pack("<Q", D + 1), "is truncated: expected 286 bytes .header, 13 sequences, 12 borders."),
    (26, struct.pack("<Q", 0), "is too long: expected 190 bytes"),
]
COLUMNS = [
    (HEADER_BYTES, "<i", -1, f"sequence 0 has length -1 at byte {HEADER_BYTES}"),
    (HEADER_BYTES + 48, "<i", -9, f"sequence 12 has length -9 at byte {HEADER_BYTES + 48}"),
    (HEADER_BYTES + 48, "<i", 10, r"pair.bin is truncated: expected 124 bytes .62 tokens of uint16., found 122"),
    (HEADER_BYTES + 48, "<i", 8, r"pair.bin is too long: expected 120 bytes .60 tokens of uint16., found 122"),
    (HEADER_BYTES + 8, "<i", 3, rf"sequence 3 points to byte 16 .*, but its predecessors end at 14.*byte {POINTERS + 24}\)"),
    (POINTERS, "<q", 2, rf"sequence 0 points to byte 2 of the .bin, but its predecessors end at 0.*byte {POINTERS}\)"),
    (POINTERS + 16, "<q", 6, rf"sequence 2 points to byte 6 of the .bin, where it overlaps .* end at 8 .*byte {POINTERS + 16}\)"),
    (POINTERS + 96, "<q", 106, r"sequence 12 points to byte 106 .* and ends at 124: outside the 122 bytes of pair\.bin"),
    (POINTERS + 40, "<q", -2, rf"sequence 5 points to byte -2 .* outside the 122 bytes .*byte {POINTERS + 40}\)"),
    (POINTERS + 40, "<q", 2**62, r"sequence 5 points to byte 4611686018427387904 .* outside the 122 bytes"),
    (BORDERS, "<q", 1, f"must rise from 0 to 13, but border 0 at byte {BORDERS} is 1"),
    (BORDERS + 24, "<q", 1, f"must rise from 0 to 13, but border 3 at byte {BORDERS + 24} is 1"),
    (BORDERS + 32, "<q", 99, f"must rise from 0 to 13, but border 4 at byte {BORDERS + 32} is 99"),
    (BORDERS + 32, "<q", -5, f"must rise from 0 to 13, but border 4 at byte {BORDERS + 32} is -5"),
    (BORDERS + 80, "<q", 12, f"must rise from 0 to 13, but border 10 at byte {BORDERS + 80} is 12"),
]  # fmt: skip


@pytest.mark.parametrize("block", [2, 3, 1 << 17])
def test_every_field_and_column(pair: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(formats, "_BLOCK", block)
    path = Path(f"{pair}.idx")
    sound = path.read_bytes()
    columns = [(offset, struct.pack(kind, value), message) for offset, kind, value, message in COLUMNS]
    for offset, raw, message in HEADER + columns:
        path.write_bytes(sound[:offset] + raw + sound[offset + len(raw) :])
        with pytest.raises(DataError, match=message):
            read_index(pair)
    path.write_bytes(sound)
    assert read_index(pair)[1].tolist() == [0, 3, 4, 9, 14, 31, 36, 39, 44, 52, 61]


def test_every_bit_of_an_index(pair: Path) -> None:
    path = Path(f"{pair}.idx")
    sound, accepted = path.read_bytes(), []
    borders = np.cumsum([0, *COUNTS])
    for bit in range(8 * len(sound)):
        raw = bytearray(sound)
        raw[bit // 8] ^= 1 << bit % 8
        patch(path, bit // 8, raw[bit // 8 : bit // 8 + 1])
        if bit % 8 == 0 and bit:
            patch(path, bit // 8 - 1, sound[bit // 8 - 1 : bit // 8])
        try:
            starts = read_index(pair)[1]
        except DataError as error:
            assert str(path) in str(error) or f"{pair}.bin" in str(error)
            continue
        # All that nobody can see: a border between documents that still lies between its neighbours.
        number, value = (
            (bit // 8 - BORDERS) // 8,
            struct.unpack_from("<q", raw, (bit // 8 - BORDERS) // 8 * 8 + BORDERS),
        )
        assert 0 < number < D - 1
        assert borders[number - 1] <= value[0] <= borders[number + 1]
        assert (
            starts == np.concatenate([[0], np.cumsum(LENGTHS)])[[*borders[:number], value[0], *borders[number + 1 :]]]
        ).all()
        accepted.append((number, value[0]))
    possible = [
        (i, int(borders[i]) ^ 1 << bit)
        for i in range(1, D - 1)
        for bit in range(4)
        if borders[i - 1] <= int(borders[i]) ^ 1 << bit <= borders[i + 1]
    ]
    assert accepted == possible
    assert len(accepted) == 10


def test_every_length_of_both_files(pair: Path) -> None:
    for end in (".idx", ".bin"):
        path = Path(f"{pair}{end}")
        sound = path.read_bytes()
        for size in (*range(len(sound)), len(sound) + 1, len(sound) + 2, 2 * len(sound)):
            path.write_bytes((sound + sound)[:size])
            message = refused(pair)
            assert f"found {size}" in message or "holds no" in message
            assert str(path) in message
        path.unlink()
        assert f"{path} is missing" in refused(pair)
        path.write_bytes(sound)
    read_index(pair)


def test_anything_in_the_header(pair: Path) -> None:
    # Whatever counts it claims: an error of ours, without an attempt to hold so much in memory.
    path, chance = Path(f"{pair}.idx"), random.Random(0)
    sound = path.read_bytes()
    for _ in range(500):
        raw = bytearray(sound)
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(9, HEADER_BYTES)] = chance.randrange(256)
        if raw != sound:
            path.write_bytes(raw)
            refused(pair)


def test_a_border_that_moved_is_found_by_its_hash(copied: Path) -> None:
    path = copied / "train.idx"
    raw = bytearray(path.read_bytes())
    sequences, borders = struct.unpack_from("<QQ", raw, 18)
    struct.pack_into("<q", raw, HEADER_BYTES + 12 * sequences + 8 * (borders // 2), borders // 2 - 1)
    path.write_bytes(raw)
    starts = read_index(copied / "train")[1]  # nothing in it contradicts the rest
    assert starts[borders // 2] == starts[borders // 2 - 1]
    with pytest.raises(DataError, match=r"train\.idx differs from what was prepared: xxh3_128 [0-9a-f]{32}, expected"):
        Corpus.open(copied)


def test_every_bit_of_a_prepared_index_is_seen(copied: Path) -> None:
    path, chance = copied / "train.idx", random.Random(1)
    sound = path.read_bytes()
    for bit in [*range(8 * HEADER_BYTES), *(chance.randrange(8 * len(sound)) for _ in range(300))]:
        raw = bytearray(sound)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"train\.(idx|bin)"):
            Corpus.open(copied)


def test_flips_in_the_tokens(copied: Path) -> None:
    path = copied / "train.bin"
    sound = path.read_bytes()
    raw = bytearray(sound)
    raw[1000] ^= 1  # one token becomes its neighbour, which only the hash can tell
    path.write_bytes(raw)
    corpus = Corpus.open(copied)
    with pytest.raises(DataError, match=r"train\.bin (differs from what was prepared|spells \d+ bytes)"):
        list(verify(corpus))
    with pytest.raises(DataError, match=r"train\.bin differs from what was prepared"):
        manifests.check_hash(path, manifests.read(copied).files["train.bin"])
    raw[1001] ^= 0x80  # outside the vocabulary: found by whoever reads it
    path.write_bytes(raw)
    loader = Loader(Corpus.open(copied), sequence_length=64, global_batch=1, micro_batch=1, seed=0)
    with pytest.raises(DataError, match=r"train\.bin: token id \d+ at byte 1000 is outside the vocabulary of 512"):
        for step in range(int(loader.steps_per_epoch) + 2):
            loader.batches(step)


def test_negative_ids_are_refused_without_a_vocabulary(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "pair", np.int16) as writer:
        writer.add(np.array([1, 2, -7, 4]), [4])
    corpus = Corpus.open(tmp_path / "pair")
    assert corpus.read(0, 0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"pair\.bin: token id -7 at byte 4 is negative"):
        corpus.read(0)


def test_a_file_that_ends_or_fails_while_it_is_read(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "read_header", lambda path: IndexHeader(np.dtype(np.uint16), 40, 41))
    with pytest.raises(DataError, match=r"pair\.idx ended at byte 278 while it was read"):
        read_index(pair)

    reads: list[int] = []

    class Failing:
        def readinto(self, buffer: memoryview) -> int:
            reads.append(len(buffer))
            raise OSError(5, os.strerror(5))

        def close(self) -> None:
            pass

    column = formats._Column(Path(f"{pair}.idx"), "<i4", HEADER_BYTES)
    column.close()
    column._file = Failing()  # type: ignore[assignment]
    with pytest.raises(DataError, match=rf"pair\.idx cannot be read at byte {HEADER_BYTES}: .*Input/output error"):
        column.read(4)
    assert reads == [16]
