"""Sizes that do not fit each other, the ranks or the model are refused without any process, and the valid ones named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.train import layout
from tests.pretrain.train.small_run import configuration


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["mesh.tp=3"], ["tp=3 does not divide 4 rank(s)", "make mesh.tp one of 1, 2, 4"]),
        (["mesh.tp=2", "mesh.dp=4"], ["the launcher started 4 rank(s)", "start 8 ranks", "(dp=2)"]),
        (["mesh.tp=4"], ["heads=2", "cannot be cut over mesh.tp=4; this model allows mesh.tp 1, 2"]),
        (["mesh.cp=4", "data.sequence_length=36"], ["a row of 36 tokens", "choose a multiple of 8"]),
        (["mesh.ep=8"], ["mesh.ep=8 does not divide dp=4", "valid here: 1, 2, 4"]),
        (["mesh.ep=4", "model.ffns.moe.experts=6"], ["experts=6", "mesh.ep=4; this model allows mesh.ep 1, 2, 3, 6"]),
        (["train.batch=6"], ["train.batch = 6", "use train.batch=4 or 8"]),
        (["train.batch=2"], ["train.batch = 2", "use train.batch=4, or"]),
        (["engine.kind=deepspeed", "mesh.tp=2"], ["mesh.tp=2: the deepspeed engine", "use engine.kind=torch"]),
        (["engine.kind=deepspeed", "engine.stage=3", "train.compile=true"], ["use engine.stage=1 or 2"]),
    ],
)
def test_layouts_that_do_not_fit_four_ranks(overrides: list[str], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        layout.check(configuration(tmp_path, tmp_path, *overrides), 4)
    for part in parts:
        assert part in str(caught.value)
