"""Training with and without byte fallback, user-defined symbols; tokenizers of Hugging Face; damaged tokenizer files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from pretrain.data.errors import DataError
from pretrain.data.seal import seal, sealed
from pretrain.data.tokenizer import Tokenizer, find, fingerprint, install
from pretrain.data.vocabulary import check_symbols, symbols_of, train

SYMBOLS = ("<|user|>", "<|end of turn|>", "{{", "ß")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    folder = Path(json.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="module")
def models(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """plain: as prepare trains it; symbols: with user-defined symbols; whole: with them, without byte fallback."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: folder / f"{name}.model" for name in ("plain", "symbols", "whole")}
    train(texts, 420, found["plain"])
    train(texts, 420, found["symbols"], user_symbols=SYMBOLS)
    train(texts, 300, found["whole"], byte_fallback=False, user_symbols=SYMBOLS)
    return found


@pytest.mark.parametrize("name", ["symbols", "whole"])
def test_user_symbols_are_one_id_each(models: dict[str, Path], name: str) -> None:
    tokenizer = Tokenizer(models[name])
    assert [tokenizer.encode(symbol) for symbol in SYMBOLS] == [[3], [4], [5], [6]]
    assert tokenizer.token_bytes[3:7].tolist() == [8, 15, 2, 2]
    text = "def f():<|user|>{{x}}<|end of turn|>\n    return 1ß"
    ids = tokenizer.encode(text)
    assert [ids.count(number) for number in (3, 4, 5, 6)] == [1, 1, 1, 1]
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


def test_without_symbols_they_are_several(models: dict[str, Path]) -> None:
    assert all(len(Tokenizer(models["plain"]).encode(symbol)) > 1 for symbol in SYMBOLS)


def test_byte_fallback(models: dict[str, Path], texts: list[str]) -> None:
    plain, whole = Tokenizer(models["symbols"]), Tokenizer(models["whole"])
    assert (plain.vocabulary_size, whole.vocabulary_size) == (420, 300)
    assert plain.decode(plain.encode("漢\0▁")) == "漢\0▁"
    assert whole.encode("漢") == [0]
    assert "<0x41>" not in {whole.piece(i) for i in range(300)}
    assert "<0x41>" in {plain.piece(i) for i in range(420)}
    printable = "\t\n" + "".join(map(chr, range(32, 127)))
    assert whole.decode(whole.encode(printable)) == printable
    assert sum(whole.decode(whole.encode(text)) == text for text in texts) == len(texts)


def test_symbols_of_the_command_line(tmp_path: Path) -> None:
    assert symbols_of("<|a|>,<|b|>") == ("<|a|>", "<|b|>")
    (tmp_path / "symbols.txt").write_text("<|a, b|>\n\n  c\nß\n", encoding="utf-8")
    assert symbols_of(str(tmp_path / "symbols.txt")) == ("<|a, b|>", "  c", "ß")
    (tmp_path / "symbols.txt").write_bytes(b"ok\n\xff\n")
    with pytest.raises(ValueError, match=r"symbols\.txt is not UTF-8 at byte 3"):
        symbols_of(str(tmp_path / "symbols.txt"))


@pytest.mark.parametrize(
    ("symbols", "why"),
    [
        (["a", ""], "'' is empty"),
        (["a", "b", "a"], "'a' is there twice"),
        (["</s>"], "'</s>' is the name of a control or byte piece"),
        (["<0x0A>"], "'<0x0A>' is the name of a control or byte piece"),
        (["a\0"], "holds NUL or U.2581"),
        (["▁a"], "holds NUL or U.2581"),
    ],
)
def test_symbols_that_cannot_be(symbols: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_symbols(symbols)


def test_room_for_symbols(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"256 bytes and 3 control ids and 2 symbols come first; use at least 262"):
        train(["abc"], 261, tmp_path / "t.model", user_symbols=("<a>", "<b>"))
    with pytest.raises(ValueError, match=r"too small: 3 control ids come first; use at least 4"):
        train(["abc"], 3, tmp_path / "t.model", byte_fallback=False)


def hugging_face(folder: Path, reserved: int = 0) -> Path:
    """A byte-level tokenizer.json whose end is named in tokenizer_config.json only."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["[[stop]]", *(f"[[reserved {number}]]" for number in range(reserved))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300 + reserved, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["def f(x):\n    return x\n" * 5], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[[stop]]"}))
    return folder


def test_a_folder_of_hugging_face(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hub")
    assert find(folder) == folder / "tokenizer.json"
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos == tokenizer.bos == 0
    text = "def f(x): return x  # ü"
    (tmp_path / "corpus").mkdir()
    for source in (folder, folder / "tokenizer.json"):
        target = install(source, tmp_path / "corpus")
        assert target == tmp_path / "corpus" / "tokenizer.model"
        copied = Tokenizer(target)
        assert (copied.eos, copied.encode(text)) == (0, tokenizer.encode(text))
        assert copied.decode(copied.encode("a [[stop]]")) == "a [[stop]]" and 0 not in copied.encode("a [[stop]]")
        assert copied.decode(copied.encode(text)) == text
        assert copied.fingerprint == tokenizer.fingerprint == fingerprint(folder / "tokenizer.json")
        assert install(tmp_path / "corpus", tmp_path / "corpus") == target
    (target.parent / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no end-of-sentence piece.* name it as eos_token"):
        _ = Tokenizer(target).eos


def test_a_folder_with_both_kinds(models: dict[str, Path], tmp_path: Path) -> None:
    small, large = hugging_face(tmp_path / "small"), hugging_face(tmp_path / "large", reserved=200)
    for folder in (small, large):
        shutil.copyfile(models["plain"], folder / "tokenizer.model")
    assert find(small).name == "tokenizer.model"
    assert find(large).name == "tokenizer.json"
    (small / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # of another library
    assert find(small).name == "tokenizer.json"
    (small / "tokenizer.model").write_bytes(models["plain"].read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        find(small)


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither tokenizer\.model nor tokenizer\.json; give"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"AutoTokenizer\.from_pretrained\('.*'\); tokenizer\.save_pretrained"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path / "none")


def test_the_seal_does_not_change_the_model(models: dict[str, Path]) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as schema

    raw = models["plain"].read_bytes()
    assert sealed(raw) is True
    bare = raw[14:-30]
    assert sealed(bare) is None
    assert seal(bare) == raw
    with_seal, without = (sentencepiece.SentencePieceProcessor(model_proto=each) for each in (raw, bare))
    pieces = [[each.id_to_piece(i) for i in range(420)] for each in (with_seal, without)]
    assert pieces[0] == pieces[1]
    read, plain = schema.ModelProto(), schema.ModelProto()
    read.ParseFromString(raw)
    plain.ParseFromString(bare)
    assert list(read.pieces) == list(plain.pieces)
    assert read.trainer_spec == plain.trainer_spec


def test_every_damaged_byte_and_every_short_file_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    raw = models["plain"].read_bytes()
    draw = random.Random(0)
    damaged = [raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :] for at in range(len(raw))]
    damaged += [raw[:size] for size in range(14, len(raw))]
    damaged += [raw[size:] for size in range(1, len(raw) - 30)]
    damaged += [raw + b"\0", raw[:5000] + raw[5001:], raw[:14] + raw[14:-30] * 2 + raw[-30:]]
    assert len(damaged) > 20_000
    assert [number for number, each in enumerate(damaged) if sealed(each) is not False] == []
    path = tmp_path / "t.model"
    for each in (damaged[0], damaged[len(raw) // 2], damaged[len(raw) - 1], raw[:100], raw[14:]):
        path.write_bytes(each)
        with pytest.raises(DataError, match=r"t\.model is damaged: it does not fit the hash at its end"):
            _ = Tokenizer(path).vocabulary_size
    for size in range(14):
        path.write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"t\.model is not a SentencePiece model"):
            _ = Tokenizer(path).vocabulary_size


def test_damaged_json(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "hub")
    raw = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json \("):
        Tokenizer(folder).encode("x")
    (folder / "tokenizer.json").write_bytes(raw)
    (folder / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer(folder).encode("x")


def test_damage_in_a_model_without_a_seal(models: dict[str, Path], tmp_path: Path) -> None:
    bare = models["plain"].read_bytes()[14:-30]
    path, draw, refused = tmp_path / "t.model", random.Random(0), 0
    for _ in range(200):
        at = draw.randrange(len(bare))
        path.write_bytes(bare[:at] + bytes([bare[at] ^ 1 << draw.randrange(8)]) + bare[at + 1 :])
        try:  # some damage cannot be told from another model; what can be is always this error
            Tokenizer(path).encode("def f(x):\n    return 1")
        except DataError as error:
            assert "t.model is not a SentencePiece model" in str(error)
            refused += 1
    assert 20 < refused < 180


def test_long_texts_are_cut_where_no_piece_reaches_across(texts: list[str], tmp_path: Path) -> None:
    import sentencepiece

    symbols = ("call me", "  two spaces  in it", "é é", "<|x|>")
    train(texts, 500, tmp_path / "t.model", user_symbols=symbols)
    tokenizer, library = (
        Tokenizer(tmp_path / "t.model"),
        sentencepiece.SentencePieceProcessor(str(tmp_path / "t.model")),
    )
    draw = random.Random(0)
    parts = [
        *symbols,
        *" \n\t",
        "    ",
        "\n    ",
        "\n        ",
        "def",
        "self.",
        "call",
        "é",
        "漢",
        "🎉",
        "x = 1",
        "\0",
        " a",
    ]
    made = ["".join(draw.choices(parts, k=6000)) for _ in range(5)]
    for text in [*made, *texts, "x" * 9000, " " * 9000, "a " * 5000, "漢字" * 3000]:
        assert tokenizer.encode(text) == library.encode(text)
    for text in (text.replace("def", "\u2581def") for text in made):  # which the library would read as a space
        assert tokenizer.decode(tokenizer.encode(text)) == text
