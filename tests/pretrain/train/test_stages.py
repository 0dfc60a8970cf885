"""A run over blends and stages: what it computes, records and keeps; interrupted and on another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import load
from pretrain.config import ConfigError
from pretrain.data.opening import loader_of, open_sources
from pretrain.train import save
from tests.pretrain.train.small_run import StopAfter, checkpoint_tensors, configuration, losses, records, train
from tests.ranks import TRAINING, run_ranks

STAGED = (
    "data.stages=[{tokens: 250, batch: 8}, {tokens: 600, sequence_length: 64, micro_batch: 2, rope_theta: 500000, "
    "weights: [1, 3]}]",
    "train.precision=fp32",
    "validation.every=4",
    "validation.sequences=4",
    "train.micro_batch=2",
)


def go(rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], stop: int | None = None) -> Any:
    config = configuration(run, corpus, *STAGED, *overrides)
    return train(config, [StopAfter(stop)] if stop is not None else [])


def blend(corpus: Path, twin: Path) -> tuple[str, ...]:
    return (f"data.sources=[{{path: {corpus}, weight: 2, name: one}}, {{path: {twin}, name: two}}]",)


def test_a_run_through_stages(corpus: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(corpus)
    ways = blend(corpus, twin)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(go, 1, whole, corpus, ways, preload=TRAINING) == [0]
    # Steps of 4 x 32 tokens; from step 2 on, after 256 tokens, of 8 x 32; from step 4 on, after 768, of 8 x 64.
    assert [record["tokens"] for record in records(whole)] == [128, 256, 512, 768, 1280, 1792]
    assert len(records(whole)[0]["epochs"]) == 2
    for line in records(whole, "validation.jsonl"):
        each = line["sources"]
        assert set(each) == {"one", "two"} and each["one"] == each["two"]  # the same text
        assert line["scored_tokens"] == 2 * each["one"]["scored_tokens"]
        assert line["validation_loss"] == pytest.approx(each["one"]["validation_loss"])
    meta = json.loads((whole / "checkpoints/step_00000006/meta.json").read_text())["meta"]
    assert meta["rope_theta"] == 500000 and meta["data"]["place"]["run"] == 1
    assert meta["data"]["place"]["counts"] == [4, 12]
    assert "rope_theta" not in json.loads((whole / "checkpoints/step_00000003/meta.json").read_text())["meta"]
    # What is loaded computes as the run did when it ended.
    model, _ = load(str(whole))
    assert {module.rope_theta for module in model.modules() if hasattr(module, "rope_theta")} == {500000.0}
    # Two ranks, stopped between two borders, and then one rank again.
    assert run_ranks(go, 2, broken, corpus, ways, 3, preload=TRAINING) == [75] * 2
    assert run_ranks(go, 1, broken, corpus, ways, preload=TRAINING) == [0]
    torch.testing.assert_close(losses(broken), losses(whole), rtol=2e-5, atol=0)
    a, b = (checkpoint_tensors(folder / "checkpoints/step_00000006") for folder in (whole, broken))
    for name in a:
        if name.startswith("model/") and a[name].is_floating_point():
            torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    state = [json.loads((f / "checkpoints/step_00000006/meta.json").read_text())["meta"] for f in (whole, broken)]
    assert state[0]["data"] == state[1]["data"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stages=[{tokens: 9, batch: 7}]", "data.stages.0: train.batch = 7: not a multiple"),
        ("data.stages=[{tokens: 9}, {tokens: 9}]", "data.stages.1.tokens = 9: stages begin one after the other"),
        ("data.stages=[{tokens: 9, weights: [1, 2]}]", "data.stages.0.weights"),
    ],
)
def test_stages_that_do_not_fit(override: str, message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        train(configuration(tmp_path / "run", corpus, override, "train.micro_batch=2"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{path: a}, {path: b/a}]", "need names that differ"),
        ("data.sources=[{path: a, weight: -1}]", "greater than or equal to 0"),
        ("data.packing=best", "'concatenate' or 'best_fit'"),
    ],
)
def test_sources_that_do_not_fit(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(tmp_path / "run", Path("a"), override)


def test_a_checkpoint_from_before_these_settings_is_the_same_run(corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", corpus)
    given = (config.data, open_sources(config.data), config.train.batch, config.train.micro_batch)
    old = config.model_dump(mode="json")
    for key in ("sources", "stages", "packing", "intra_document_masking", "order", "workers", "on_bad"):
        del old["data"][key]
    keys = ("corpus", "seed", "sequence_length", "step", "sequences", "skipped")
    state = loader_of(*given).state_dict()
    data = {"order_version": 1, **{key: state[key] for key in keys}, "step": 3, "sequences": 12}
    run: Any = SimpleNamespace(config=config, processes=SimpleNamespace(first=True), step=3, tokens=12 * 32)
    save._check(run, loader_of(*given), {"config": old, "data": data})
    loader = loader_of(*given)
    loader.load_state_dict(save._data_state({"data": data}, loader, run))
    first = loader_of(config.data.model_copy(update={"order": 1}), *given[1:])
    assert torch.equal(loader.batches(3)[0].tokens, first.batches(3)[0].tokens)
    assert loader.state_dict()["order_version"] == 1
    # Another packing is another order.
    other = config.model_copy(update={"data": config.data.model_copy(update={"packing": "best_fit"})})
    run.config = other
    with pytest.raises(ValueError, match=r"data\.packing: concatenate in the checkpoint, best_fit here"):
        save._check(run, loader_of(other.data, *given[1:]), {"config": old, "data": data})
    loader = loader_of(other.data, *given[1:])
    loader.load_state_dict(save._data_state({"data": data}, loader, run))  # where it is allowed: from the beginning
    assert loader.first_sequence(3) == 0 and loader.state_dict()["order_version"] == 2
