"""train.initial: a run that starts from weights that are already there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from tests.pretrain.train.small_run import StopAfter, checkpoint_tensors, configuration, losses, train, train_on_rank
from tests.ranks import TRAINING, run_ranks

SHORT = ("train.steps=2", "train.precision=fp32", "checkpoint.every=1", "checkpoint.keep=5")
STILL = ("optimizer.lr=1e-30",)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint_tensors(run / f"checkpoints/step_{step:08d}")
    return {name: tensor for name, tensor in found.items() if name.startswith("model/")}


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    assert train(configuration(run, corpus, *SHORT, "train.seed=5")) == 0
    return run


def test_training_begins_at_the_given_weights_and_goes_on_from_its_own(
    first: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, taken = tmp_path / "run", first / "checkpoints/step_00000001"
    settings = (*SHORT, f"train.initial={taken}")
    assert train(configuration(run, corpus, *settings, *STILL), [StopAfter(1)]) == 75
    assert f"initial weights: {taken}" in capsys.readouterr().out
    # A step that moves nothing but the routers' biases keeps the weights as they were given.
    given, kept = weights(first, 1), weights(run, 1)
    assert given.keys() == kept.keys()
    assert [n for n in given if not n.endswith("router.bias") and not torch.equal(given[n], kept[n])] == []
    # Now there is a checkpoint, and it counts; the folder may be gone.
    shutil.move(taken, tmp_path / "elsewhere")
    try:
        assert train(configuration(run, corpus, *settings)) == 0
    finally:
        shutil.move(tmp_path / "elsewhere", taken)
    assert "initial weights" not in capsys.readouterr().out
    assert len(losses(run)) == 2


def test_two_ranks_begin_where_one_does(first: Path, corpus: Path, tmp_path: Path) -> None:
    settings = (*SHORT, f"train.initial={first}")
    zero = ("engine.kind=deepspeed", "engine.stage=2")
    assert train(configuration(tmp_path / "one", corpus, *settings)) == 0
    run_ranks(train_on_rank, 2, tmp_path / "zero", corpus, (*settings, *zero), preload=TRAINING)
    expected = losses(tmp_path / "one")
    torch.testing.assert_close(losses(tmp_path / "zero"), expected, rtol=2e-5, atol=0)
    assert abs(losses(first)[0] - expected[0]) > 1e-3  # not where untrained weights begin


def test_another_model_is_named(first: Path, corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", corpus, *SHORT, f"train.initial={first}", "model.width=48")
    with pytest.raises(ConfigError, match="holds another model") as caught:
        train(config)
    text = str(caught.value)
    assert (
        "differs: model/blocks.0.mixer.qkv.weight is float32 [48, 32] in the checkpoint and float32 [48, 48] here"
        in text
    )
    assert "meta.json, or leave train.initial out" in text and "another run folder" not in text


def test_what_fits_but_computes_otherwise_is_said(
    first: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = "model.mixers.attention.rope_theta=500"
    assert train(configuration(tmp_path / "run", corpus, *SHORT, f"train.initial={first}", changed)) == 0
    line = "unlike there, model.mixers.attention.rope_theta = 500.0: it has 10000.0"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_weights_there(name: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"{name}: no (such folder|checkpoints yet)"):
        train(configuration(tmp_path / "run", corpus, *SHORT, f"train.initial={tmp_path / name}"))
