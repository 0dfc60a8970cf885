"""What trace and inspect say of a step is what the loaders hand out there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pretrain.data import Corpus
from pretrain.data.__main__ import main, parse
from pretrain.data.opening import loader_of, open_sources
from tests.pretrain.train.small_run import configuration

STAGES = "data.stages=[{tokens: 250, batch: 8}, {tokens: 600, sequence_length: 64}]"


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main([*words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_trace_says_what_loaders_read(
    packing: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (STAGES, f"data.packing={packing}", f"data.sources=[{{path: {prepared}}}, {{path: {tmp_path}/b}}]")
    (tmp_path / "b").symlink_to(prepared)
    config = configuration(tmp_path / "run", prepared, *overrides)
    corpora = open_sources(config.data)
    given = [*overrides, "train.batch=4", "train.micro_batch=1", f"run={tmp_path}/run"]
    given += ["data.sequence_length=32", f"data.path={prepared}"]
    for step in (1, 3, 5):
        found = lines(
            capsys, "trace", "--config", "configs/runs/quickstart.yaml", "--step", str(step), "--ranks", "2", *given
        )
        assert found[0].startswith(
            f"step {step} (counted from 0): {4 if step < 2 else 8} sequences of {32 if step < 4 else 64}"
        )
        each = [loader_of(config.data, corpora, 4, 1, rank, 2).batches(step) for rank in range(2)]
        assert len(found) == 1 + sum(map(len, each))
        for line in found[1:]:
            match = re.match(r"rank (\d) micro-batch (\d) sequence 0: (\w+) epoch \d+ number \d+: ", line)
            assert match is not None
            batch = each[int(match[1])][int(match[2])]
            corpus = corpora[0 if match[3] == prepared.name else 1]
            spans = [tuple(map(int, span)) for span in re.findall(r"document (\d+) \[(\d+), (\d+)\)", line)]
            tokens = [
                token for document, start, end in spans for token in corpus.read(document, start, end - start).tolist()
            ]
            assert batch.tokens[0].tolist()[: len(tokens)] == tokens
            assert len(tokens) + batch.padding == batch.tokens.numel()
            assert (f"; {batch.padding} of padding" in line) == (batch.padding > 0)


def test_inspect_shows_the_text(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "configs/runs/quickstart.yaml", "--step", "2", f"run={tmp_path}/run"]
    given += [f"data.path={prepared}", "train.batch=1", "train.micro_batch=1"]
    given += ["data.sequence_length=64"]
    config = configuration(tmp_path / "run", prepared, "data.sequence_length=64", "train.batch=1")
    corpus = Corpus.open(prepared)
    loader = loader_of(config.data, [corpus], 1, 1)
    assert main(["inspect", *given]) == 0
    out = capsys.readouterr().out
    for piece in loader.stream.row(loader.references(2, 0, 1)[0][0]).pieces:
        assert corpus.tokenizer().decode(corpus.read(piece.document, piece.start, piece.length).tolist()) in out
    assert torch.is_tensor(loader.batches(2)[0].tokens)


def test_what_cannot_be_traced(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "configs/runs/quickstart.yaml", f"data.path={prepared}", f"run={tmp_path}"]
    assert main(["trace", *given, "--step", "-1"]) == 2
    assert "counted from 0" in capsys.readouterr().err
    assert main(["trace", *given, "--step", "1", "--ranks", "7"]) == 2
    assert "does not divide by 7" in capsys.readouterr().err
    assert main(["trace", *given, "--step", "1", "data.sede=1"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    assert main(["trace", *given, "--step", "1", "train.batch"]) == 2
    assert "'train.batch' is no override; write key=value" in capsys.readouterr().err
    for words in (["inspect", "--step", "1"], ["inspect", *given, "--step", "1", "folder"], ["inspect", "a", "b"]):
        assert main(words) == 2
        assert "takes a FOLDER, or --config and --step together" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["trace", *given, "--step", "1", "--steps", "3"])
    assert "unrecognized arguments: --steps 3" in capsys.readouterr().err


def test_overrides_stand_anywhere() -> None:
    for words in (
        ["trace", "a=1", "--config", "x", "b.c=[2, 3]", "--step", "4", "d=5"],
        ["trace", "--config", "x", "--step", "4", "a=1", "b.c=[2, 3]", "d=5"],
        ["inspect", "--config", "x", "a=1", "--step", "4", "b.c=[2, 3]", "d=5"],
        ["statistics", "a=1", "--config", "x", "b.c=[2, 3]", "d=5"],
        ["trace", "--set", "a=1", "--config", "x", "--set=b.c=[2, 3]", "--step", "4", "d=5"],  # as it was once
    ):
        args = parse(words)
        assert args.overrides == ["a=1", "b.c=[2, 3]", "d=5"] and args.paths == [] and args.config == "x"
    assert parse(["statistics", "a=1", "--plot", "x.png", "b"]).paths == ["a=1", "b"]  # folders
