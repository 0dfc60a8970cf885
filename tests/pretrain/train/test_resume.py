"""Interrupted and resumed equals uninterrupted, bit for bit; and what must not be resumed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pretrain.train.small_run import checkpoint_tensors, losses, train_on_rank
from tests.ranks import TRAINING, run_ranks

TORCH: tuple[str, ...] = ()
ZERO2 = ("engine.kind=deepspeed", "engine.stage=2")
PIPELINE = ("mesh.pp=2", "mesh.pp_schedule=zbv", "mesh.pp_layers=[0, 1, 1, 0]")


@pytest.mark.parametrize(
    ("world", "overrides", "stop"),
    [(1, TORCH, 4), (2, TORCH, 2), (2, ZERO2, 4), (2, PIPELINE, 4)],
    ids=["one rank", "two ranks FSDP2", "two ranks ZeRO-2", "a pipeline in a V"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    world: int, overrides: tuple[str, ...], stop: int, corpus: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(train_on_rank, world, whole, corpus, overrides, preload=TRAINING) == [0] * world
    assert run_ranks(train_on_rank, world, broken, corpus, overrides, stop, preload=TRAINING) == [75] * world
    assert len(losses(broken)) == stop
    assert run_ranks(train_on_rank, world, broken, corpus, overrides, preload=TRAINING) == [0] * world
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6
    a, b = (checkpoint_tensors(folder / "checkpoints/step_00000006") for folder in (whole, broken))
    assert a.keys() == b.keys()
    kinds = {name.split("/")[0] for name in a}
    assert kinds == {"model", "optimizer", "rank"} and any("router.bias" in name for name in a)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
    meta = [
        json.loads((folder / "checkpoints/step_00000006/meta.json").read_text())["meta"] for folder in (whole, broken)
    ]
    assert meta[0]["data"] == meta[1]["data"] and meta[0]["tokens"] == meta[1]["tokens"] == 6 * 4 * 32


def test_a_checkpoint_crosses_engines_and_world_sizes(corpus: Path, tmp_path: Path) -> None:
    """ZeRO-2 on two ranks, then FSDP2 on four, then one plain rank: the same losses as one rank all along.

    Experts are three: FSDP2 cuts those of four ranks along another dim.
    """
    few = "model.ffns={moe: {kind: moe, experts: 3, top_k: 2, hidden: 16}, hourglass: {kind: hourglass, hidden: 16, depth: 2}}"
    fp32 = ("train.precision=fp32", few)
    mixed, alone = tmp_path / "mixed", tmp_path / "alone"
    run_ranks(train_on_rank, 2, mixed, corpus, (*fp32, *ZERO2), 2, preload=TRAINING)
    run_ranks(train_on_rank, 4, mixed, corpus, fp32, 4, preload=TRAINING)
    run_ranks(train_on_rank, 1, mixed, corpus, fp32, 5, preload=TRAINING)
    run_ranks(train_on_rank, 2, mixed, corpus, (*fp32, *ZERO2), preload=TRAINING)
    run_ranks(train_on_rank, 1, alone, corpus, fp32, preload=TRAINING)
    torch.testing.assert_close(losses(mixed), losses(alone), rtol=2e-5, atol=0)


def test_metrics_of_steps_done_again_are_not_kept_twice(corpus: Path, tmp_path: Path) -> None:
    run_ranks(train_on_rank, 1, tmp_path, corpus, (), 4, preload=TRAINING)
    newest = tmp_path / "checkpoints/step_00000004"
    for file in newest.iterdir():
        file.unlink()  # as if the job had died before step 4 was saved
    newest.rmdir()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and in the middle of a line
    run_ranks(train_on_rank, 1, tmp_path, corpus, (), preload=TRAINING)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
