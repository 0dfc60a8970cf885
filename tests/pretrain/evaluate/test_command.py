"""The command: exact byte counts, agreement with training's validation, JSON, tables, exit codes, names of tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pretrain.data.store import Corpus
from pretrain.data.tokenizer import Tokenizer
from pretrain.evaluate import commands, sources
from pretrain.evaluate.__main__ import main, parse
from pretrain.evaluate.report import finite
from pretrain.evaluate.windows import batches
from pretrain.exit import Exit
from pretrain.loading import load, open_checkpoint
from tests.pretrain.train.small_run import configuration
from tests.ranks import ROOT

TEXT = "import torch\n\n\ndef größe(x):\n    return x  # \u2581 ein Strich, and 🙂\n" * 3


def call(run: Path, tasks: str, *options: str) -> int:
    return main(["--checkpoint", str(run), "--device", "cpu", "--tasks", tasks, *options])


def results(path: Path) -> dict:
    return json.loads(path.read_text())["results"]


def test_text_files_are_counted_to_the_byte(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_bytes(TEXT.encode())
    files[1].write_bytes(b"x = 1\r\n")
    out = tmp_path / "out.json"
    assert call(run, "perplexity", "--text", *map(str, files), "--json", str(out), "--stride", "7") == 0
    first, second = results(out)["perplexity"]
    model, tokenizer = load(run)
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("x = 1\r\n"), tokenizer.eos]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    assert second["tokens"] == ids.shape[1] - 1 and second["bytes"] == 7
    assert second["bits_per_byte"] == pytest.approx(nats / torch.log(torch.tensor(2.0)).item() / 7, rel=1e-5)
    assert (
        first["bytes"] == len(TEXT.encode())
        and first["tokens"] == len(tokenizer.encode(TEXT)) + 1
        and first["stride"] == 7
    )
    assert first["perplexity"] == pytest.approx(2.718281828 ** first["nats_per_token"], rel=1e-6)
    table = capsys.readouterr().out
    assert "bits/byte" in table and str(files[0]) in table and f"{first['bits_per_byte']:.4f}" in table


def test_a_prepared_corpus_gives_what_its_texts_give(run: Path, corpus: Path, tmp_path: Path) -> None:
    """And without --text and --data it is the run's own."""
    out = tmp_path / "out.json"
    opened = Corpus.open(corpus, "validation")
    tokenizer = opened.tokenizer()
    text = tmp_path / "first.txt"
    text.write_bytes(tokenizer.decode(opened.read(0).tolist()).encode())
    alone = len(opened.read(0)) - 1
    limit = ["--limit", str(alone), "--json", str(out)]
    figures = []
    for source in (["--text", str(text)], ["--data", str(corpus)], []):
        assert call(run, "perplexity", *source, *limit) == 0
        figures.append(results(out)["perplexity"][0])
    assert {row["tokens"] for row in figures} == {alone}
    assert {row["bytes"] for row in figures} == {text.stat().st_size}
    assert figures[0]["nats_per_token"] == figures[1]["nats_per_token"] == figures[2]["nats_per_token"]


def test_each_source_of_a_run_has_its_own_text(corpus: Path, tmp_path: Path) -> None:
    """The validation_path that a source names, else the split beside its training text; none twice."""
    for name in ("second", "third"):
        (tmp_path / name).symlink_to(corpus)
    pair = corpus / "validation"
    tokenizer = Tokenizer(corpus / "tokenizer.model")

    def names(*given: dict[str, str]) -> list[str]:
        config = configuration(tmp_path / "run", Path(given[0]["path"]), f"data.sources={json.dumps(given)}")
        found = sources.of_run(config, tokenizer)
        assert all(source.targets() == sources.of_corpus(corpus, "validation", tokenizer).targets() for source in found)
        return [source.name for source in found]

    one, two, three = str(corpus), str(tmp_path / "second"), str(tmp_path / "third")
    assert names({"path": one}, {"path": two}) == [f"{one} (validation)", f"{two} (validation)"]
    assert names({"path": one}, {"path": two, "validation_path": three}) == [
        f"{one} (validation)",
        f"{three} (validation)",
    ]
    bare = {"path": f"{one}/train", "name": "bare", "validation_path": str(pair)}
    assert names(bare, {"path": two, "validation_path": str(pair)}) == [str(pair)]
    with pytest.raises(Exit, match=f"{one}/train is not a prepared folder"):
        names({"path": one}, {"path": f"{one}/train", "name": "bare"})


def test_all_of_them_are_scored(run: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "second").symlink_to(corpus)
    given = [{"path": str(corpus)}, {"path": str(tmp_path / "second")}]
    blended = configuration(run, corpus, "model.repeat=3", f"data.sources={json.dumps(given)}")
    opened = open_checkpoint(run)._replace(config=blended)
    with patch.object(commands, "open_checkpoint", lambda *options: opened):
        assert call(run, "perplexity", "--limit", "20", "--json", str(tmp_path / "o.json")) == 0
    rows = results(tmp_path / "o.json")["perplexity"]
    assert [row["source"] for row in rows] == [f"{each['path']} (validation)" for each in given]
    assert [row["tokens"] for row in rows] == [20, 20] and rows[0]["perplexity"] == rows[1]["perplexity"]


def test_a_limit_cuts_documents_where_it_ends(corpus: Path) -> None:
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    source = sources.of_corpus(corpus, "validation", tokenizer)
    first = int(source.lengths[0])
    for limit in (1, first - 1, first, first + 10):
        documents = list(source.documents(limit))
        counted = sum(batch.scored for batch in batches(documents, 32, 16, 4))
        assert counted == sum(len(document) - 1 for document in documents) == sum(source.targets(limit)) == limit
    whole = sum(len(document) - 1 for document in source.documents())
    assert whole == sum(source.targets()) == int(source.lengths.sum()) - len(source.lengths)


def test_standard_input_and_help(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.evaluate"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "examples:" in shown.stdout and "lm_eval:NAME" in shown.stdout
    light = (
        "import sys; from pretrain.evaluate import __main__; import pretrain.generate; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", light], cwd=ROOT, check=True)
    done = subprocess.run(
        [*command, "--checkpoint", str(run), "--tasks", "perplexity", "--text", "-", "--json", str(tmp_path / "o.json")],
        cwd=ROOT, input=TEXT.encode(), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "o.json")["perplexity"][0]["bytes"] == len(TEXT.encode())
    assert done.stderr == b""  # no bar where nobody watches


def test_recall_tasks_and_the_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--context", "128", "--mqar-pairs", "2,5", "--mqar-examples", "3", "--needle-depths", "0,1"]
    files = ["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "n.png")]
    assert call(run, "mqar,needle", *options, "--needle-samples", "1", "--needle-lengths", "100,128", *files) == 0
    found = results(tmp_path / "o.json")
    assert [(row["pairs"], row["queries"], row["chance_among_values"]) for row in found["mqar"]] == [
        (2, 6, 0.5),
        (5, 15, 0.2),
    ]
    assert found["needle"]["lengths"] == [100, 128] and found["needle"]["depths"] == [0.0, 1.0]
    assert "validation" in found["needle"]["haystack"]
    assert len(found["needle"]["log_probability"]) == 2 and found["needle"]["mean_log_probability"] < -1
    assert (tmp_path / "n.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert "accuracy among values" in out and "128 tokens" in out


def test_a_placed_model_scores_the_same(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "o.json"
    base = ["--text", str(tmp_path / "a.txt"), "--json", str(out)]
    assert call(run, "perplexity", *base) == 0
    plain = results(out)
    assert call(run, "perplexity", *base, "--memory-limit", "200KiB", "--offload", str(tmp_path / "layers")) == 0
    assert results(out) == plain


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (
            "perplexty",
            [],
            "unknown task 'perplexty'; did you mean 'perplexity'? valid tasks: perplexity, mqar, needle, lm_eval:NAME",
        ),
        ("lm_eval:", [], "unknown task 'lm_eval:'"),
        ("perplexity", ["--text", "no/such/file"], "cannot read no/such/file"),
        ("perplexity", ["--stride", "33"], "stride 33 is not between 1 and the context of 32"),
        ("perplexity", ["--json", "no/such/folder/x"], "no such folder"),
        ("mqar", ["--mqar-pairs", "4,9"], "9 pairs do not fit in 32 tokens; ask for at most 7 pairs"),
        ("needle", ["--synthetic"], "use longer --needle-lengths"),
        ("perplexity", ["--memory-limit", "1KiB"], "allow at least"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    run: Path, tasks: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run, tasks, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_other_faults_have_their_codes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert call(run, "perplexity", "--text", str(tmp_path / "latin")) == 77
    assert "not UTF-8" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert call(tmp_path / "empty", "perplexity") == 78
    with pytest.raises(SystemExit) as stopped:
        parse(["--checkpoint", "x", "--tasks", "mqar", "--plot", "x.png"])
    assert stopped.value.code == 2


def test_another_tokenizer_is_refused(run: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes((corpus / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(ValueError, match="tokenized with another tokenizer"):
        sources.of_corpus(corpus, "validation", Tokenizer(tmp_path / "other.model"))


def test_numbers_that_json_does_not_know_become_null() -> None:
    assert finite({"a": [1.5, float("nan"), {"b": (float("inf"), 2)}]}) == {"a": [1.5, None, {"b": [None, 2]}]}
