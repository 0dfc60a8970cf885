from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from pretrain.data import DataError, Tokenizer
from pretrain.data.vocabulary import line_breaks, train
from tests.pretrain.data.texts import NASTY


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer(prepared / "tokenizer.model")


def spelled(tokenizer: Tokenizer, ids: list[int]) -> int:
    return int(tokenizer.token_bytes[ids].sum())


@pytest.mark.parametrize("text", ["", *NASTY])
def test_nasty_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert spelled(tokenizer, ids) == len(text.encode())
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)


def test_random_text_survives(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    alphabet = [*"abc<>s/0x41_u()=.,:'", *" \n" * 4, "\0", "\t", "\r", "▁", "▅", "⁇", "é", "漢", "🎉", "\ufeff"]
    for _ in range(3000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert spelled(tokenizer, ids) == len(text.encode())


def test_every_file_survives(tokenizer: Tokenizer, text_folder: Path) -> None:
    for path in text_folder.iterdir():
        text = path.read_bytes().decode()
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_line_breaks_with_indentation_are_single_ids(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n    ")) == 1
    assert len(tokenizer.encode("\n        ")) == 1
    # Tokens of a fixed piece of code: 10 words and marks at best, one a byte at worst (57).
    assert len(tokenizer.encode("    def f(self):\n        if self.x is None:\n            return")) <= 24


def test_line_breaks_are_counted() -> None:
    text = "a\n    b\n    c\n\n        d\n\te\n"
    found = line_breaks([text] * 3)
    assert found[0] == "\n\n▁▁▁▁▁▁▁▁"  # saves 9 ids each time, three times
    assert set(found) == {"\n\n▁▁▁▁▁▁▁▁", "\n▁▁▁▁", "\n\t"}


def test_ids_and_table(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocabulary_size == 512 == len(tokenizer.token_bytes)
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.token_bytes[[0, 1, 2]].tolist() == [0, 0, 0]
    assert int((tokenizer.token_bytes[3:] > 0).all())
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("x y"), tokenizer.eos]) == "x y"
    assert tokenizer.piece(1) == "<s>"
    assert repr("\n    ") in {tokenizer.piece(i) for i in range(512)}


def test_travels_to_other_processes_by_path(tokenizer: Tokenizer) -> None:
    tokenizer.encode("load it")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("x = 1") == tokenizer.encode("x = 1")


def test_training_does_not_depend_on_anything_but_the_text(tmp_path: Path, text_folder: Path) -> None:
    texts = [path.read_bytes().decode() for path in sorted(text_folder.glob("json_*"))]
    train(texts, 400, tmp_path / "a.model")
    train(texts, 400, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_vocabulary_larger_than_the_text_supports_names_the_largest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocabulary 9999 is more .* use --vocabulary (\d+) or less") as caught:
        train(["def f():\n    return 1\n"], 9999, tmp_path / "t.model")
    largest = int(str(caught.value).split("use --vocabulary ")[1].split()[0])
    train(["def f():\n    return 1\n"], largest, tmp_path / "t.model")
    assert Tokenizer(tmp_path / "t.model").vocabulary_size == largest


def test_vocabulary_too_small_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use at least 260"):
        train(["abc"], 100, tmp_path / "t.model")
    wide = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 300)) * 3
    with pytest.raises(ValueError, match=r"use --vocabulary (\d+) or more") as caught:
        train([wide], 300, tmp_path / "t.model")
    smallest = int(str(caught.value).split("use --vocabulary ")[1].split()[0])
    train([wide], smallest, tmp_path / "t.model")


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model").encode("x")
