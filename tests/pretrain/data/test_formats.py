"""The writer and the reader of Megatron pairs, against the layout written out by hand."""

from __future__ import annotations

import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import Corpus, DataError
from pretrain.data import index as formats
from pretrain.data import writer as writers
from pretrain.data.__main__ import main
from pretrain.data.index import DTYPES, read_header, read_index, read_modes
from pretrain.data.writer import IndexWriter, PairWriter, dtype_for


def by_hand(code: int, lengths: list[int], item: int, borders: list[int], modes: list[int] | None = None) -> bytes:
    """An index, number by number."""
    pointers = [item * sum(lengths[:i]) for i in range(len(lengths))]
    raw = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
    raw += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    return raw + struct.pack(f"<{len(borders)}q", *borders) + bytes(modes or [])


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_byte_for_byte(tmp_path: Path, code: int) -> None:
    dtype = np.dtype(DTYPES[code])
    largest = min(int(np.iinfo(dtype).max), 2**40)
    ids = np.array([1, 2, 3, largest, 5, 0], np.int64)
    with PairWriter(tmp_path / "pair", dtype) as writer:
        writer.add(ids[:4], [3, 1])
        writer.add(ids[4:], np.array([2], np.uint16))
        assert (writer.documents, writer.tokens) == (3, 6)
        assert not (tmp_path / "pair.idx").exists()
    assert (tmp_path / "pair.idx").read_bytes() == by_hand(code, [3, 1, 2], dtype.itemsize, [0, 1, 2, 3])
    assert (tmp_path / "pair.bin").read_bytes() == ids.astype(dtype).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin", "pair.idx"]
    corpus = Corpus.open(tmp_path / "pair")
    assert (corpus.documents, corpus.tokens, corpus.dtype) == (3, 6, dtype)
    assert corpus.lengths.tolist() == [3, 1, 2]
    assert [corpus.read(i).tolist() for i in range(3)] == [[1, 2, 3], [largest], [5, 0]]


def test_documents_of_several_sequences_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "BLOCK", 3)
    monkeypatch.setattr(formats, "_BLOCK", 3)
    with PairWriter(tmp_path / "pair", np.int32, modes=True) as writer:
        writer.add(np.arange(9), [2, 3, 0, 4])
        writer.add(np.arange(9, 20), [5, 1, 5], [2, 0, 1], [0, 1, 7])
        writer.add(np.arange(20, 22), [1, 1])
        writer.add(np.zeros(0, np.int64), [], [0])
    lengths = [2, 3, 0, 4, 5, 1, 5, 1, 1]
    borders = [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 9]
    modes = [0, 0, 0, 0, 0, 1, 7, 0, 0]
    assert (tmp_path / "pair.idx").read_bytes() == by_hand(4, lengths, 4, borders, modes)
    header, starts = read_index(tmp_path / "pair")
    assert (header.sequences, header.borders, header.modes) == (9, 11, True)
    assert starts.tolist() == [0, 2, 5, 5, 9, 15, 15, 20, 21, 22, 22]
    found = read_modes(tmp_path / "pair")
    assert found is not None
    assert found.tolist() == modes
    corpus = Corpus.open(tmp_path / "pair")
    assert corpus.read(4).tolist() == [9, 10, 11, 12, 13, 14]
    assert corpus.read(5).tolist() == corpus.read(9).tolist() == []


def test_inspect_tells_sequences_and_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PairWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add(np.arange(9), [4, 5])
    with PairWriter(tmp_path / "several", np.uint16, modes=True) as writer:
        writer.add(np.arange(9), [4, 2, 3], [1, 2], [0, 1, 0])
    for name in ("plain", "several"):
        assert main(["inspect", str(tmp_path / name), "--samples", "0"]) == 0
        out = capsys.readouterr().out
        assert f"{name}: 2 documents, 9 tokens of uint16" in out
        assert ("its documents are 3 sequences" in out) == (name == "several")
        assert ("its sequences have modes (2 of mode 0, 1 of mode 1)" in out) == (name == "several")


def test_as_many_documents_as_sequences_but_not_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (2, 100):
        monkeypatch.setattr(formats, "_BLOCK", block)
        prefix = tmp_path / f"pair{block}"
        with PairWriter(prefix, np.uint16) as writer:
            writer.add(np.arange(10), [1, 2, 3, 4], [1, 1, 0, 2])
        assert read_index(prefix)[1].tolist() == [0, 1, 3, 3, 10]
        assert read_modes(prefix) is None


def test_what_the_format_cannot_hold_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "pair", np.uint16) as writer:
        for add, message in [
            (lambda: writer.add(np.array([1, 70000]), [2]), "token id 70000 does not fit uint16"),
            (lambda: writer.add(np.array([1, -1]), [2]), "token id -1 does not fit uint16"),
            (lambda: writer.add(np.array([1.0]), [1]), "token ids must be integers in one row, got float64"),
            (lambda: writer.add(np.array([1, 2]), [1]), "lengths add up to 1 tokens, but there are 2"),
            (lambda: writer.add(np.array([1, 2]), [3, -1]), "lengths must lie from 0 to 2147483647, got -1"),
            (lambda: writer.add(np.array([1, 2]), [1, 1], [1]), "documents of 1 sequences were given 2 lengths"),
            (lambda: writer.add(np.array([1]), [1], modes=[1]), "pass `modes=True`"),
            (lambda: writer.index.add([2**31]), "lengths must lie from 0 to 2147483647, got 2147483648"),
        ]:
            with pytest.raises(ValueError, match=message):
                add()
        writer.add(np.array([7], np.uint16), [1])
    assert Corpus.open(tmp_path / "pair").read(0).tolist() == [7]
    assert (tmp_path / "pair.bin").stat().st_size == 2
    with pytest.raises(ValueError, match="has no code for token ids of float32: choose one of uint8, int8, int16"):
        PairWriter(tmp_path / "floats", np.float32)
    with pytest.raises(ValueError, match=r"pair\.idx exists: remove it"):
        PairWriter(tmp_path / "pair", np.uint16)
    with pytest.raises(ValueError, match=r"pair\.idx exists: remove it"):
        IndexWriter(tmp_path / "pair", np.uint16)
    with IndexWriter(tmp_path / "modes", np.int8, modes=True) as index:
        for modes, message in [
            ([200], "modes must lie from 0 to 127, got 200"),
            ([1, 1], "1 sequences were given 2 modes"),
        ]:
            with pytest.raises(ValueError, match=message):
                index.add([4], modes=modes)
        index.add([4], modes=[1])
    assert (tmp_path / "modes.idx").read_bytes() == by_hand(2, [4], 1, [0, 1], [1])


def test_an_index_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with PairWriter(tmp_path / "pair", np.uint16) as writer:
            writer.add(np.arange(4), [1, 3], [2])
            assert not (tmp_path / "pair.idx").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    # Also when there is no space for the last part of the index.
    full = PairWriter(tmp_path / "pair", np.uint16)
    full.add(np.arange(4), [1, 3])
    monkeypatch.setattr(writers, "pack_header", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"), full:
        full.finish()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    # What a killed process leaves does not pass for an index, and does not disturb the next attempt.
    killed = PairWriter(tmp_path / "pair", np.uint16)
    killed.add(np.arange(4), [1, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin.partial", "pair.idx.partial"]
    with PairWriter(tmp_path / "pair", np.uint16) as writer:
        writer.add(np.arange(2), [2])
    assert (tmp_path / "pair.idx").read_bytes() == by_hand(8, [2], 2, [0, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin", "pair.idx"]
    with pytest.raises(DataError, match="holds no documents"), PairWriter(tmp_path / "none", np.uint16) as writer:
        writer.finish()
        assert (tmp_path / "none.idx").read_bytes() == by_hand(8, [], 2, [0])
        Corpus.open(tmp_path / "none")
    with PairWriter(tmp_path / "empty", np.uint16) as writer:
        writer.add(np.zeros(0, np.uint16), [0, 0])
    with pytest.raises(DataError, match=r"empty\.idx holds no tokens"):
        Corpus.open(tmp_path / "empty")


def _peak(prefix: Path, documents: int, several: bool) -> tuple[int, int]:
    """Bytes that writing and then reading an index took at most, beside what stays."""
    tracemalloc.start()
    with IndexWriter(prefix, np.uint16, modes=several) as index:
        for _ in range(documents // 50_000):
            index.add(np.full(50_000, 700), np.full(25_000, 2) if several else None)
    wrote = tracemalloc.get_traced_memory()[1]
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        file.truncate(2 * 700 * documents)
    tracemalloc.reset_peak()
    kept = read_index(prefix)[1].nbytes
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return wrote, read - kept


@pytest.mark.parametrize("several", [False, True])
def test_memory_does_not_grow_with_the_index(tmp_path: Path, several: bool) -> None:
    small = _peak(tmp_path / "small", 1_000_000, several)
    large = _peak(tmp_path / "large", 2_000_000, several)
    assert abs(large[0] - small[0]) < 100_000  # of 20 MB that the index has more
    # Where a document is several sequences, 8 bytes for each of these are held until the documents are known.
    assert abs(large[1] - small[1] - (8 * 1_000_000 if several else 0)) < 100_000


def test_a_corpus_is_small_in_a_pickle(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "pair", np.uint16) as writer:
        writer.add(np.arange(50_000) % 1000, np.full(25_000, 2))
    corpus = Corpus.open(tmp_path / "pair", vocabulary_size=1000)
    assert corpus.lengths.sum() == 50_000
    raw = pickle.dumps(corpus)
    assert len(raw) < 2000
    again = pickle.loads(raw)
    assert np.array_equal(again.starts, corpus.starts)
    assert np.array_equal(again.read(700), corpus.read(700))
    assert (again.fingerprint, again.tokens) == (corpus.fingerprint, 50_000)


def test_the_type_of_a_vocabulary() -> None:
    assert [dtype_for(size).name for size in (256, 65499, 65500, 200_000)] == ["uint16", "uint16", "int32", "int32"]


def test_header_of_an_index_without_its_data(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "pair", np.int64) as index:
        index.add([5, 6])
    header = read_header(tmp_path / "pair.idx")
    assert (header.dtype, header.sequences, header.borders, header.modes) == (np.dtype(np.int64), 2, 3, False)
    with pytest.raises(DataError, match=r"pair\.bin is missing"):
        read_index(tmp_path / "pair")


def test_bench_of_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "index", "--documents", "200000", "--mean", "50", "--peer", "1000", "--folder", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    tokens = re.search(r"index of 200,000 documents, ([\d,]+) tokens: 4\.0 MB", out)
    assert tokens is not None
    assert 9_000_000 < int(tokens[1].replace(",", "")) < 11_000_000
    # Far less than the index itself, which numpy and Python hold besides; a list of its lengths alone would be more.
    grown = re.search(r"^built .* ([\d.]+) MB more", out, re.MULTILINE)
    assert grown is not None
    assert float(grown[1]) < 20
    assert "the two indices of 1,000 documents are the same bytes" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "index", "--documents", "0"]) == 2
