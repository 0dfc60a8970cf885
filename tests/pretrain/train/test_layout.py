"""Layouts that cannot be are refused before any process group forms, with the field to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.train import layout
from tests.pretrain.train.small_run import configuration

DEEP = "model.layers=[gdn + moe x4]"


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (4, ("mesh.pp=4",), r"2 layers cannot be cut into 4 pipeline stages; make mesh.pp x mesh.pp_virtual at most 3"),
        (2, ("mesh.pp=2", "mesh.pp_schedule=zbv"), "2 layers cannot be cut into 4 pipeline stages"),
        (2, ("mesh.pp=2", "mesh.pp_virtual=2"), "mesh.pp_virtual=2: mesh.pp_schedule=1f1b has one stage a rank"),
        (
            4,
            ("mesh.pp=4", DEEP, "train.micro_batch=2"),
            "mesh.pp=4.*at least 4 micro-batches.*there are 2; lower train",
        ),
        (4, ("mesh.pp=2", "train.micro_batch=2"), "mesh.pp=2.*at least 2 micro-batches.*there are 1"),
        (
            2,
            ("mesh.pp=2", "mesh.pp_schedule=interleaved", DEEP, "train.batch=5"),
            "interleaved: 5 micro-batches .* 4 or 6 could",
        ),
        (2, ("mesh.pp=2", "mesh.pp_layers=[2]"), r"mesh.pp_layers=\[2\]: give 2 numbers"),
        (
            4,
            ("mesh.pp=4", DEEP, "mesh.pp_layers=[2, 0, 2, 0]"),
            r"mesh.pp_layers=\[2, 0, 2, 0\]: pipeline rank 1 would hold stages \[1\], which have no layers",
        ),
        (
            2,
            ("mesh.pp=2", DEEP, "mesh.pp_schedule=zbv", "train.compile=true"),
            "zbv .* compiled blocks cannot; use mesh.pp_schedule=interleaved, or train.compile=false",
        ),
        (2, ("mesh.pp=2", "engine.kind=deepspeed"), "mesh.pp=2: .*deepspeed.* engine.kind=torch, or mesh.pp=1"),
        (2, ("mesh.pp=2", "engine.reduce_each_micro_batch=true"), "engine.reduce_each_micro_batch=true: a pipeline"),
    ],
)
def test_pipelines_that_cannot_be(world: int, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    config = configuration(tmp_path, tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        layout.check(config, world)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, ("mesh.pp=2",)),
        (3, ("mesh.pp=3",)),  # the last stage has the head alone
        (2, ("mesh.pp=2", DEEP, "mesh.pp_schedule=zbv", "train.micro_batch=4")),
        (2, ("mesh.pp=2", DEEP, "mesh.pp_schedule=interleaved", "train.compile=true")),
        (8, ("mesh.pp=2", "mesh.tp=2", DEEP, "mesh.pp_layers=[0, 4]")),
    ],
)
def test_pipelines_that_can_be(world: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert layout.check(configuration(tmp_path, tmp_path, *overrides), world).world == world
