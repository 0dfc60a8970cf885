"""The wrong tokenizer for a corpus is refused by hash, and a damaged one as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.errors import DataError
from pretrain.data.opening import open_sources
from pretrain.data.store import Corpus
from pretrain.data.tokenizer import Tokenizer, fingerprint
from pretrain.data.tokenizer_check import hash_of
from pretrain.data.vocabulary import train


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with as many ids as the corpus's, which mean something else."""
    path = tmp_path_factory.mktemp("other") / "other.model"
    train(["".join(f"word{number} of another kind\n" for number in range(2000))], 400, path)
    return path


def sources(*paths: Path, tokenizer: Path | None = None) -> DataConfig:
    listed = [SourceConfig(path=path, name=str(number)) for number, path in enumerate(paths)]
    return DataConfig.model_validate({"sources": listed, "sequence_length": 16, "tokenizer": tokenizer})


def test_the_tokenizer_of_the_configuration(prepared: Path, other: Path, tmp_path: Path) -> None:
    own = prepared / "tokenizer.model"
    copy = Path(shutil.copyfile(own, tmp_path / "copy.model"))
    for given in (None, own, copy):
        assert hash_of(open_sources(sources(prepared, tokenizer=given))) == fingerprint(own)
    for path in (prepared, prepared / "train"):  # also where a pair of the folder is named as a bare one
        with pytest.raises(ValueError, match=r"tokenizer = .*other\.model \(xxh3_128 [0-9a-f]{32}\) is not the") as e:
            open_sources(sources(path, tokenizer=other))
        assert fingerprint(other) in str(e.value)
        assert fingerprint(own) in str(e.value)
        assert "--tokenizer" in str(e.value)


def test_a_pair_that_is_looked_at(prepared: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(prepared / "train"), "--tokenizer", str(other)]) == 2
    assert "is not the tokenizer that" in capsys.readouterr().err
    assert main(["inspect", str(prepared / "train"), "--tokenizer", str(prepared), "--samples", "0"]) == 0


def bare(prepared: Path, folder: Path) -> Path:
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copyfile(prepared / f"train{suffix}", folder / f"train{suffix}")
    return folder / "train"


def test_a_bare_pair_is_what_it_is_opened_with(prepared: Path, other: Path, tmp_path: Path) -> None:
    pair = bare(prepared, tmp_path / "bare")
    assert hash_of(open_sources(sources(pair))) is None
    opened = open_sources(sources(pair, tokenizer=prepared / "tokenizer.model"))
    assert hash_of(opened) == fingerprint(prepared / "tokenizer.model")
    with pytest.raises(ValueError, match="is not the tokenizer that"):
        open_sources(sources(pair, prepared, tokenizer=other))
    assert len(open_sources(sources(pair, prepared, tokenizer=prepared / "tokenizer.model"))) == 2


def test_sources_of_different_tokenizers(copied: Path, prepared: Path, other: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    shutil.copyfile(other, copied / "tokenizer.model")
    manifest["files"]["tokenizer.model"] = {"bytes": other.stat().st_size, "xxh3_128": fingerprint(other)}
    manifest["tokenizer"]["xxh3_128"] = fingerprint(other)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was written with another tokenizer \(xxh3_128 .*: prepare it again with"):
        open_sources(sources(prepared, copied))


def test_sources_of_different_ends(copied: Path, prepared: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["tokenizer"]["eos"] = 5
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was written with bos 1 and eos 5, .*train with 1 and 2: prepare it again"):
        open_sources(sources(prepared, copied))


@pytest.mark.parametrize("name", ["tokenizer.model", "token_bytes.npy"])
def test_a_flipped_byte_in_a_corpus(copied: Path, name: str) -> None:
    path = copied / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name} differs from what was prepared: xxh3_128 "):
        Corpus.open(copied)


def test_another_tokenizer_in_a_corpus(copied: Path, other: Path) -> None:
    size = (copied / "tokenizer.model").stat().st_size
    raw = other.read_bytes()
    (copied / "tokenizer.model").write_bytes(raw[:size].ljust(size, b"\0"))
    with pytest.raises(DataError, match=r"tokenizer\.model differs from what was prepared"):
        Corpus.open(copied, "validation")
    with pytest.raises(DataError, match=r"tokenizer\.model is damaged"):
        Tokenizer(copied).encode("x")
