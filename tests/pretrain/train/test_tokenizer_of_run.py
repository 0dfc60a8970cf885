"""A model goes with one tokenizer: another one is refused when a run goes on, and when the model is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config import ConfigError, RunConfig
from pretrain.data.errors import DataError
from pretrain.data.opening import open_sources
from pretrain.data.tokenizer import fingerprint
from pretrain.data.vocabulary import train as train_vocabulary
from pretrain.loading import load
from pretrain.train.save import _identities
from tests.pretrain.train.small_run import StopAfter, configuration, train

SHORT = ("train.steps=2", "train.precision=fp32", "checkpoint.every=1", "checkpoint.keep=5")


@pytest.fixture(scope="module")
def pair(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as bare Megatron pairs, its tokenizer, and another one of the same size."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("train", "validation"):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(corpus / f"{name}{suffix}", folder / f"{name}{suffix}")
    shutil.copyfile(corpus / "tokenizer.model", folder / "own.model")
    train_vocabulary(["".join(f"word{n} of another kind, {n * n}\n" for n in range(4000))], 512, folder / "other.model")
    return folder


def settings(pair: Path, tokenizer: str) -> tuple[str, ...]:
    return (*SHORT, f"data.tokenizer={pair / tokenizer}", f"data.validation_path={pair / 'validation'}")


def test_the_tokenizer_of_a_run(pair: Path, tmp_path: Path) -> None:
    run, own, other = tmp_path / "run", fingerprint(pair / "own.model"), fingerprint(pair / "other.model")
    assert train(configuration(run, pair / "train", *settings(pair, "own.model")), [StopAfter(1)]) == 75
    meta = json.loads((run / "checkpoints/step_00000001/meta.json").read_text())["meta"]
    assert meta["tokenizer"] == own == fingerprint(run / "tokenizer.model")

    # Resumed: the pair is the same, so only the hash can tell.
    with pytest.raises(ConfigError, match=rf"data\.tokenizer_hash: {own} in the checkpoint, {other} here"):
        train(configuration(run, pair / "train", *settings(pair, "other.model")))
    assert fingerprint(run / "tokenizer.model") == own
    intended = (*settings(pair, "other.model"), "checkpoint.allow_changes=[data.tokenizer_hash]")
    assert train(configuration(run, pair / "train", *intended)) == 0

    # Used: what lies in the run is what the newest checkpoint was trained with, and an older one was not.
    tokenizer = load(run, device="cpu")[1]
    assert tokenizer.fingerprint == other
    with pytest.raises(
        DataError, match=rf"\(xxh3_128 {other}\) is not the tokenizer that .*00000001 was trained with \({own}\)"
    ):
        load(run / "checkpoints/step_00000001", device="cpu")
    shutil.copyfile(pair / "own.model", run / "tokenizer.model")
    with pytest.raises(DataError, match="so the model's ids mean other text: copy the tokenizer of the data"):
        load(run, device="cpu")
    assert load(run / "checkpoints/step_00000001", device="cpu")[1].encode("x") == tokenizer.encode("x")


def test_where_one_side_does_not_know_its_tokenizer(pair: Path, tmp_path: Path) -> None:
    own, other = fingerprint(pair / "own.model"), fingerprint(pair / "other.model")
    bare = configuration(tmp_path, pair / "train")
    knowing = configuration(tmp_path, pair / "train", f"data.tokenizer={pair / 'own.model'}")

    def hashes(saved: str | None, config: RunConfig) -> list[str | None]:
        meta = {"config": config.model_dump(mode="json"), "data": {"corpus": "c"}, "tokenizer": saved}
        loader: Any = SimpleNamespace(corpora=open_sources(config.data), fingerprint="c")
        run: Any = SimpleNamespace(config=config)
        return [side["data"].get("tokenizer_hash") for side in _identities(run, meta, loader)]

    assert hashes(other, knowing) == [other, own]
    assert hashes(None, knowing) == hashes(other, bare) == hashes(None, bare) == [None, None]
