"""Bits that flip in one rank's memory: found by the other holders of the same values, and undone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.train.fault_runs import Corrupt, curve, different, events, go, kinds, state

CASES = {
    # ranks, mesh, what is hit and on which rank, who is accused
    "optimizer of replicas": (3, ("mesh.replicate=3", "train.batch=6"), "optimizer/norm.weight/exp_avg_sq", 0, [0]),
    "hybrid sharding": (4, ("mesh.replicate=2",), "model/embedding.weight", 3, [1, 3]),
    "a norm under tensor parallelism": (2, ("mesh.tp=2",), "model/blocks.1.mixer_norm.weight", 1, [0, 1]),
    "tied embedding of two stages": (2, ("mesh.pp=2", "model.tie_embeddings=true"), "model/embedding.weight", 1, [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_the_run_ends_as_if_it_had_not_been(case: str, corpus: Path, tmp_path: Path) -> None:
    """Hit after step 5, checked every other step, saved every third: found at 6, back at 3."""
    world, mesh, name, rank, accused = CASES[case]
    overrides = ("train.steps=7", "checkpoint.every=3", "faults.replica_check_every=2", *mesh)
    clean, struck = tmp_path / "clean", tmp_path / "struck"
    assert go(world, clean, corpus, *overrides)[0] == 0
    assert go(world, struck, corpus, *overrides, callbacks=[Corrupt(name, [5], rank)])[0] == 0
    assert kinds(clean) == [] and kinds(struck) == [(6, "replicas differ"), (3, "back")]
    found, back = events(struck)
    assert [label.split(" on ")[0] for label in found["where"]] == [f"rank {one}" for one in accused]
    assert name in found["tensors"] and back["origin"] == 6
    assert curve(struck) == curve(clean) and [step for step, *_ in curve(struck)] == list(range(1, 8))
    assert different(state(struck, 7), state(clean, 7)) == []


def test_what_is_saved_has_passed_the_check(corpus: Path, tmp_path: Path) -> None:
    """The next check would be at step 50; the save of step 4 comes before it."""
    overrides = ("train.steps=4", "checkpoint.every=2", "faults.replica_check_every=50", "mesh.replicate=2")
    assert go(2, tmp_path, corpus, *overrides, callbacks=[Corrupt("model/norm.weight", [3], 1)])[0] == 0
    assert kinds(tmp_path) == [(4, "replicas differ"), (2, "back")]


def test_a_rank_that_differs_again_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    overrides = ("checkpoint.every=3", "mesh.replicate=3", "train.batch=6")
    hit = Corrupt("model/norm.weight", [4, 4], rank=1)
    overrides = (*overrides, "faults.replica_check_every=2")
    answer = go(3, tmp_path, corpus, *overrides, callbacks=[hit])[0]
    assert answer.startswith("79: step 6: rank 1 on ") and "differs from its replicas again within 2 steps" in answer
    assert kinds(tmp_path) == [(6, "replicas differ"), (3, "back"), (6, "replicas differ"), (6, "stop")]


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(corpus: Path, tmp_path: Path) -> None:
    overrides = ("checkpoint.every=6", "mesh.replicate=2", "faults.replica_check_every=2")
    answer = go(2, tmp_path, corpus, *overrides, callbacks=[Corrupt("model/norm.weight", [1], 0)])[0]
    assert answer.startswith("1: step 2: rank 0 on ") and "no checkpoint yet" in answer
