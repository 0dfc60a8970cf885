"""Which changes of configuration a resume accepts, and what it says about the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pretrain.checkpoint.identity import check_same_model, differences

CONFIG: dict[str, Any] = {
    "run": "runs/a",
    "model": {"width": 64, "layers": [{"kind": "attention", "heads": 4}, {"kind": "gated_delta_net"}], "tied": True},
    "data": {
        "path": "corpus",
        "hash": "abc",
        "sequence_length": 128,
        "seed": 0,
        "prefetch": True,
        "validation_limit": None,
    },
    "train": {"steps": 100, "batch": 8, "micro_batch": 2, "seed": 0, "clip": 1.0},
    "optimizer": {"kind": "adamw", "lr": 3e-4},
    "mesh": {"dp": 2},
}


def changed(**values: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for key, value in values.items():
        *parents, last = key.split("__")
        target: Any = config
        for part in parents:
            target = target[int(part) if isinstance(target, list) else part]
        target[last] = value
    return config


def test_equal_configurations_pass() -> None:
    assert check_same_model(CONFIG, copy.deepcopy(CONFIG)) == []


def test_free_changes_pass() -> None:
    free = changed(
        run="b", train__steps=500, train__micro_batch=4, train__clip=None, optimizer__lr=1e-3, mesh__dp=4,
        data__prefetch=False, data__validation_limit=5,
    )  # fmt: skip
    assert check_same_model(CONFIG, free) == []


def test_another_model_is_refused_with_both_values_and_cannot_be_allowed() -> None:
    other = changed(model__width=128, model__layers__0__heads=8)
    del other["model"]["layers"][1]
    other["model"]["tied"] = 1  # what YAML reads from `1` is not what it reads from `true`
    with pytest.raises(ValueError) as caught:
        check_same_model(CONFIG, other, allow=["model.*", "*"])
    assert str(caught.value).splitlines() == [
        "The checkpoint holds another model:",
        "  model.width: 64 in the checkpoint, 128 here",
        "  model.layers.0.heads: 4 in the checkpoint, 8 here",
        "  model.layers.1.kind: gated_delta_net in the checkpoint, (absent) here",
        "  model.tied: True in the checkpoint, 1 here",
        "Undo the change, or start another run folder.",
    ]


def test_another_data_order_is_refused_unless_named() -> None:
    other = changed(data__sequence_length=256, data__seed=1, train__batch=16, train__seed=1, data__hash="def")
    with pytest.raises(ValueError) as caught:
        check_same_model(CONFIG, other, allow=["data.seed"])
    text = str(caught.value)
    assert text.startswith("The checkpoint was written with another order of the data:")
    assert "data.sequence_length: 128 in the checkpoint, 256 here" in text and "data.seed: 0" not in text
    assert text.endswith("checkpoint.allow_changes=[data.hash, data.sequence_length, train.batch, train.seed]")
    lines = check_same_model(CONFIG, other, allow=["data.*", "train.batch", "train.seed"])
    assert "train.batch: 8 in the checkpoint, 16 here" in lines and len(lines) == 5


def test_a_corpus_may_move_if_its_hash_is_known_and_equal() -> None:
    assert check_same_model(CONFIG, changed(data__path="/elsewhere")) == []
    for unknown in (None, "def"):
        with pytest.raises(ValueError, match=r"data\.path: corpus in the checkpoint, /elsewhere here"):
            check_same_model(CONFIG, changed(data__path="/elsewhere", data__hash=unknown))


def test_new_and_old_keys_and_json_types() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a.b": (1, "(absent)"), "a.c": ("(absent)", 2)}
    assert differences({"a": [1, 2], "e": []}, {"a": (1, 2), "e": ()}) == {}
    assert differences({"a": 1}, {"a": 1.0}) == {}
    assert differences({"a": []}, {"a": [1]}) == {"a": ([], "(absent)"), "a.0": ("(absent)", 1)}
