from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import xxhash

from pretrain.data import Corpus, Tokenizer
from pretrain.data.encode import split_of
from pretrain.data.manifest import Manifest, read
from pretrain.data.merge import SPLITS
from pretrain.data.options import PrepareOptions
from pretrain.data.prepare import prepare
from pretrain.data.sampling import sample, sources_of
from pretrain.data.sources import Reading
from tests.pretrain.data.conftest import SEED, VALIDATION
from tests.pretrain.data.texts import NASTY


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Any:
    """Prepares with the shared tokenizer, which spares training one."""

    def call(*patterns: object, name: str = "out", **changes: Any) -> Path:
        given = {
            "tokenizer": prepared / "tokenizer.model",
            "validation": VALIDATION,
            "seed": SEED,
            "workers": 1,
            **changes,
        }
        prepare(PrepareOptions([str(pattern) for pattern in patterns], tmp_path / name, **given))
        return tmp_path / name

    return call


def texts(folder: Path, split: str) -> list[bytes]:
    corpus = Corpus.open(folder, split)
    tokenizer = corpus.tokenizer()
    return [tokenizer.decode(corpus.read(i).tolist()).encode() for i in range(corpus.documents)]


def everything(folder: Path) -> list[bytes]:
    return sorted(text for split in read(folder).splits for text in texts(folder, split))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_there_once_byte_for_byte(prepared: Path, text_folder: Path) -> None:
    files = Counter(path.read_bytes() for path in text_folder.iterdir())
    assert Counter(everything(prepared)) == Counter(text for text in files if text)
    manifest = read(prepared)
    assert manifest.input_files == len(list(text_folder.iterdir()))
    assert manifest.dropped == {"duplicate": 0, "empty": files[b""], "unreadable": 0}
    for split in manifest.splits:
        corpus = Corpus.open(prepared, split)
        ends = {corpus.tokenizer().bos, corpus.tokenizer().eos}
        for ids in (corpus.read(i).tolist() for i in range(corpus.documents)):
            assert (ids[0], ids[-1]) == (corpus.tokenizer().bos, corpus.eos) and not ends & set(ids[1:-1])


def test_manifest_states_the_files(prepared: Path) -> None:
    manifest = read(prepared)
    present = {path.name for path in prepared.iterdir()}
    assert present == {*manifest.files, "manifest.json"}
    assert {"train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.model"} < present
    for name, record in manifest.files.items():
        raw = (prepared / name).read_bytes()
        assert (record.bytes, record.xxh3_128) == (len(raw), xxhash.xxh3_128_hexdigest(raw))
    for split in SPLITS:
        corpus, stated = Corpus.open(prepared, split), manifest.splits[split]
        assert stated.documents == corpus.documents
        assert stated.tokens == corpus.tokens == (prepared / f"{split}.bin").stat().st_size / 2
        assert stated.bytes == sum(map(len, texts(prepared, split)))
        assert stated.bytes_per_token == pytest.approx(stated.bytes / stated.tokens, abs=1e-4)
        assert stated.longest_document == corpus.lengths.max()
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.lossless
    assert manifest.tokenizer.trained
    assert not [path for path in prepared.parent.iterdir() if path != prepared]


def test_the_split_depends_on_the_document_alone(prepared: Path, text_folder: Path, tmp_path: Path, run: Any) -> None:
    held_out = set(texts(prepared, "validation"))
    folder = tmp_path / "renamed"
    folder.mkdir()
    for number, path in enumerate(sorted(text_folder.iterdir(), reverse=True)):
        (folder / f"{number:03}.py").write_bytes(path.read_bytes())
    (folder / "new.py").write_text("x = 1\n")
    again = run(f"{folder}/*")
    assert set(texts(again, "validation")) - {b"x = 1\n"} == held_out
    before = [text for text in texts(again, "validation") if text != b"x = 1\n"]
    assert before == texts(prepared, "validation")  # and so does its place among them


def test_the_split_has_the_share_asked_for_and_follows_the_seed() -> None:
    digests = [xxhash.xxh3_128_digest(str(i).encode()) for i in range(20000)]
    chosen = [split_of(digest, 0, 0.05) == "validation" for digest in digests]
    assert abs(sum(chosen) - 1000) < 5 * (20000 * 0.05 * 0.95) ** 0.5
    assert chosen != [split_of(digest, 1, 0.05) == "validation" for digest in digests]
    larger = [split_of(digest, 0, 0.1) == "validation" for digest in digests]
    assert all(b for a, b in zip(chosen, larger) if a)  # a larger share keeps what was held out


def test_workers_do_not_change_a_byte(prepared: Path, text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "three"
    prepare(PrepareOptions([f"{text_folder}/*"], output, vocabulary=512, validation=VALIDATION, seed=SEED, workers=3))
    assert contents(output) == contents(prepared)


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path: Path, run: Any) -> None:
    for name, text in {"a": "one\n", "b": "two\n", "c": "one\n", "d": "", "e": "one\n"}.items():
        (tmp_path / name).write_text(text)
    folder = run(f"{tmp_path}/?", validation=0.0)
    assert everything(folder) == [b"one\n", b"two\n"]
    assert read(folder).dropped == {"duplicate": 2, "empty": 1, "unreadable": 0}
    assert set(read(folder).splits) == {"train"}
    assert not (folder / "validation.bin").exists()
    with pytest.raises(ValueError, match="has no 'validation' split"):
        Corpus.open(folder, "validation")


def test_rows_hold_the_same_documents_as_files(text_folder: Path, prepared: Path, tmp_path: Path, run: Any) -> None:
    documents = [path.read_bytes().decode() for path in sorted(text_folder.iterdir())]
    half = len(documents) // 2
    rows = [json.dumps({"n": i, "body": text}) for i, text in enumerate(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:half]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[half:]).encode()))
    table = pyarrow.table({"body": documents, "n": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for patterns in ([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz"], [f"{tmp_path}/c.parquet"]):
        folder = run(*patterns, name=f"from_{len(patterns)}", text_field="body")
        assert everything(folder) == everything(prepared)
        assert (folder / "train.bin").read_bytes() == (prepared / "train.bin").read_bytes()


def test_rows_with_nasty_text(tmp_path: Path, run: Any) -> None:
    (tmp_path / "n.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in NASTY))
    assert everything(run(tmp_path / "n.jsonl", validation=0.0)) == sorted(text.encode() for text in NASTY)


def test_bad_files_and_rows_can_be_skipped(tmp_path: Path, run: Any) -> None:
    (tmp_path / "good.txt").write_text("good\n")
    (tmp_path / "bad.txt").write_bytes(b"latin \xe9\n")
    rows = [b'{"text": "r1"}', b'{"text": ', b"[1]", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": 5}']
    rows += [b'{"text": null}', b'{"text": "r2"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    folder = run(f"{tmp_path}/*.*", validation=0.0, on_bad="skip")
    assert everything(folder) == [b"good\n", b"r1", b"r2"]
    assert read(folder).dropped == {"duplicate": 0, "empty": 1, "unreadable": 7}


def test_documents_can_be_cut_at_line_breaks(tmp_path: Path, run: Any) -> None:
    lines = [f"line {i} é\n" for i in range(400)]
    long = "".join(chr(0x4E00 + i) for i in range(1000))
    (tmp_path / "a.txt").write_bytes("".join([*lines, long]).encode())
    folder = run(tmp_path / "a.txt", document_bytes=1024, validation=0.3)
    pieces = everything(folder)
    assert len(pieces) > 6
    assert max(map(len, pieces)) <= 1024
    assert sum(map(len, pieces)) == (tmp_path / "a.txt").stat().st_size
    assert sum(piece.endswith(b"\n") for piece in pieces) >= 4
    assert all(piece.decode() for piece in pieces)


def test_limit_takes_less_from_all_over(text_folder: Path, run: Any) -> None:
    folder = run(f"{text_folder}/*", limit_bytes=100_000)
    total = sum(split.bytes for split in read(folder).splits.values())
    longest = max(path.stat().st_size for path in text_folder.iterdir())
    assert 100_000 <= total < 100_000 + longest
    names = {path.read_bytes(): path.name for path in text_folder.iterdir()}
    taken = sorted(names[text] for text in everything(folder))
    assert taken != sorted(path.name for path in text_folder.iterdir() if path.stat().st_size)[: len(taken)]
    assert len({name.split("_")[0] for name in taken}) >= 3
    assert everything(run(f"{text_folder}/*", name="again", limit_bytes=100_000)) == everything(folder)


def test_the_sample_is_shared_fairly_and_never_holds_validation_text(tmp_path: Path) -> None:
    files = []
    for name, count in (("small", 10), ("large", 2000), ("larger", 4000)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{name} {i:06}"}) for i in range(count)))
        files.append((path, "jsonl", path.stat().st_size))
    options = PrepareOptions(["x"], tmp_path, sample_bytes=20_000, validation=0.3)
    reading = Reading()
    chosen = sample(sources_of(files, [], reading), options, reading, lambda *_: None)
    sizes = Counter[str]()
    for text in chosen:
        sizes[text.split()[0]] += len(text)
        if len(text.split()[-1]) == 6:  # not the one cut to fit
            assert split_of(xxhash.xxh3_128_digest(text.encode()), 0, 0.3) == "train"
    assert sum(sizes.values()) == 20_000
    assert abs(sizes["large"] - sizes["larger"]) < 20
    assert 0 < sizes["small"] < 200


def test_overwrite_replaces_only_what_prepare_wrote(tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    folder = run(tmp_path / "a.txt", validation=0.0)
    before = contents(folder)
    with pytest.raises(ValueError, match="is not empty; pass `--overwrite`"):
        run(tmp_path / "a.txt", validation=0.0)
    (tmp_path / "a.txt").write_text("b\n")
    assert contents(run(tmp_path / "a.txt", validation=0.0, overwrite=True)) != before
    assert everything(folder) == [b"b\n"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="--overwrite leaves it alone"):
        run(tmp_path / "a.txt", name="mine", overwrite=True)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run(tmp_path / "a.txt", name="a.txt", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "mine", "out"]


def test_an_empty_folder_is_taken_and_a_failure_keeps_the_old_one(tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "out").mkdir()
    before = contents(run(tmp_path / "a.txt", validation=0.0))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(Exception, match="not UTF-8 at byte 0"):
        run(tmp_path / "a.txt", validation=0.0, overwrite=True)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_tokenizer_that_loses_bytes_is_noticed(tmp_path: Path, run: Any) -> None:
    import sentencepiece

    model = tmp_path / "lossy.model"
    with model.open("wb") as stream:
        lines = ["the quick brown fox", "jumps over the lazy dog"] * 10
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=stream, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    (tmp_path / "a.txt").write_text("two  spaces, É\n")
    manifest: Manifest = read(run(tmp_path / "a.txt", tokenizer=model, validation=0.0))
    assert not manifest.tokenizer.lossless
    assert not manifest.tokenizer.trained
    assert manifest.tokenizer.vocabulary_size == Tokenizer(model).vocabulary_size
