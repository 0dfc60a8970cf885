from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data import Corpus, DataError
from pretrain.data.index import HEADER_BYTES
from pretrain.data.megatron import indexed_dataset


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> None:
    """Documents of one or more sequences, by megatron-core's own builder."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def truncate(path: Path, cut: int) -> int:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - cut)
    return size


def patch(path: Path, offset: int, raw: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(raw)


def test_megatron_reads_what_we_wrote(prepared: Path, text_folder: Path) -> None:
    theirs = indexed_dataset().IndexedDataset(str(prepared / "train"))
    ours = Corpus.open(prepared)
    assert len(theirs) == ours.documents == len(theirs.document_indices) - 1
    assert theirs.index.dtype is np.uint16
    tokenizer = ours.tokenizer()
    originals = {path.read_bytes() for path in text_folder.iterdir()}
    for i in range(len(theirs)):
        ids = theirs[i].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.decode(ids).encode() in originals
        assert ours.read(i).tolist() == ids
    assert ours.read(1, 3, 4).tolist() == theirs[1][3:7].tolist()


def test_we_read_what_megatron_wrote(tmp_path: Path) -> None:
    documents = [[[5, 6, 7], [8]], [[9]], [[70000, 1, 2, 3]]]
    write_megatron(tmp_path / "pair", documents)
    corpus = Corpus.open(tmp_path / "pair")
    assert (corpus.documents, corpus.tokens, corpus.dtype) == (3, 9, np.dtype(np.int32))
    assert [corpus.read(i).tolist() for i in range(3)] == [[5, 6, 7, 8], [9], [70000, 1, 2, 3]]
    assert corpus.read(0, 2, 2).tolist() == [7, 8]
    assert corpus.manifest is None
    assert corpus.vocabulary_size is None
    with pytest.raises(ValueError, match="no tokenizer beside it"):
        corpus.tokenizer()
    with pytest.raises(DataError, match="token id 70000 at byte 20 is outside the vocabulary of 500"):
        Corpus.open(tmp_path / "pair", vocabulary_size=500).read(2)


def test_a_bare_pair_takes_a_tokenizer(prepared: Path) -> None:
    corpus = Corpus.open(prepared / "validation", tokenizer=prepared / "tokenizer.model")
    assert corpus.vocabulary_size == 512
    assert corpus.token_bytes is not None
    whole = Corpus.open(prepared, "validation")
    assert whole.token_bytes is not None
    assert torch.equal(corpus.token_bytes, whole.token_bytes)
    assert corpus.fingerprint != whole.fingerprint  # one is the manifest's hash, the other is taken from the files


def test_bare_fingerprint_follows_the_content(tmp_path: Path) -> None:
    for name, token in (("a", 5), ("b", 5), ("c", 6)):
        write_megatron(tmp_path / name, [[[1, 2, token]]])
    a, b, c = (Corpus.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "tokenizer.model", "token_bytes.npy"])
def test_truncated_files_of_a_prepared_folder(copied: Path, name: str) -> None:
    size = truncate(copied / name, 2)
    with pytest.raises(
        DataError, match=rf"{name} is truncated: expected {size} bytes .* found {size - 2}; copy the file"
    ):
        Corpus.open(copied)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "manifest.json"])
def test_missing_files(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(DataError, match=name):
        Corpus.open(copied)


def test_truncated_bare_pair(copied: Path) -> None:
    size = truncate(copied / "train.bin", 4)
    with pytest.raises(DataError, match=rf"train.bin is truncated: expected {size} bytes .* found {size - 4}"):
        Corpus.open(copied / "train")
    size = truncate(copied / "validation.idx", 1)
    with pytest.raises(DataError, match=rf"validation.idx is truncated: expected {size} bytes .* found {size - 1}"):
        Corpus.open(copied / "validation")
    truncate(copied / "validation.idx", size - 20)
    with pytest.raises(DataError, match="its header needs 34 bytes, found 19"):
        Corpus.open(copied / "validation")


@pytest.mark.parametrize(
    ("offset", "raw", "message"),
    [
        (0, b"X", "is not a Megatron index"),
        (9, b"\x02", "index version 2 at byte 9"),
        (17, b"\x07", "dtype code 7 at byte 17"),
        (18, struct.pack("<Q", 10**9), "is truncated: expected 12"),
        (HEADER_BYTES, struct.pack("<i", -4), f"sequence 0 has length -4 at byte {HEADER_BYTES}"),
        (HEADER_BYTES, struct.pack("<i", 77), "sequence 1 points to byte"),
    ],
)
def test_damaged_index(copied: Path, offset: int, raw: bytes, message: str) -> None:
    patch(copied / "train.idx", offset, raw)
    with pytest.raises(DataError, match=message) as caught:
        Corpus.open(copied)
    assert "train.idx" in str(caught.value)
    assert caught.value.exit_code == 77


def test_damaged_borders(copied: Path) -> None:
    size = (copied / "train.idx").stat().st_size
    patch(copied / "train.idx", size - 8, struct.pack("<q", 10**6))
    with pytest.raises(DataError, match=r"document borders .* must rise from 0 to"):
        Corpus.open(copied)


def test_token_outside_the_vocabulary_names_the_byte(copied: Path) -> None:
    patch(copied / "train.bin", 40, struct.pack("<H", 60000))
    corpus = Corpus.open(copied)
    corpus.read(0, 0, 20)
    with pytest.raises(DataError, match=r"train\.bin: token id 60000 at byte 40 is outside the vocabulary of 512"):
        corpus.read(0, 0, 30)


def test_index_of_another_run(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["splits"]["train"]["tokens"] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the files are from different runs"):
        Corpus.open(copied)


@pytest.mark.parametrize("raw", ["{", "[]", '{"format": "braid-corpus", "version": 2}'])
def test_damaged_manifest(copied: Path, raw: str) -> None:
    (copied / "manifest.json").write_text(raw)
    with pytest.raises(DataError, match=r"manifest\.json is damaged or of another version"):
        Corpus.open(copied)


def test_wrong_names(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no 'test' split \(it has train, validation\)"):
        Corpus.open(prepared, "test")
    with pytest.raises(DataError, match="neither a prepared folder nor the prefix"):
        Corpus.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        Corpus.open(tmp_path)


def test_a_pair_without_documents(tmp_path: Path) -> None:
    write_megatron(tmp_path / "none", [])
    with pytest.raises(DataError, match="holds no documents"):
        Corpus.open(tmp_path / "none")
