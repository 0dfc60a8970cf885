"""Bytes of state, and messages, as counted against those of real engines on gloo."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.grid import Grid
from pretrain.estimate.layout import Collective, rank_costs
from pretrain.estimate.model import ModelCosts
from tests.pretrain.estimate.estimate_ranks import Key, Seen, step
from tests.pretrain.estimate.settings import config
from tests.ranks import TRAINING, run_ranks

# name: (model, ranks, sections of the run)
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one": ("attention moe", 1, {}),
    "fsdp": ("attention moe", 2, {"train": {"batch": 2}}),
    "fsdp, joined": ("gated delta net", 2, {"train": {"batch": 4}, "engine": {"bucket_bytes": 300_000}}),
    "fsdp, accumulated": ("gated delta net", 2, {"train": {"batch": 6}}),
    "fsdp, reduced each time": (
        "zaya", 2, {"train": {"batch": 6}, "engine": {"reduce_each_micro_batch": True, "reshard_after_forward": False}},
    ),
    "fsdp in uneven parts": ("union hourglass", 3, {"train": {"batch": 3, "precision": "bf16"}}),
    "fsdp, recomputed": ("zaya", 2, {"train": {"batch": 4, "recompute": "full"}}),
    "hsdp": ("attention moe", 4, {"train": {"batch": 4}, "mesh": {"replicate": 2}}),
    "ddp": ("gla", 2, {"train": {"batch": 4}, "mesh": {"replicate": 2}}),
    "tp": ("attention moe", 2, {"mesh": {"tp": 2}}),
    "tp, bf16": ("union hourglass", 2, {"mesh": {"tp": 2}, "train": {"precision": "bf16"}}),
    "tp 4 with copies of key heads": ("attention moe", 4, {"mesh": {"tp": 4}}),
    "tp, recomputed": ("zaya", 2, {"mesh": {"tp": 2}, "train": {"recompute": "full", "precision": "bf16"}}),
    "tp, selectively": ("gated delta net", 2, {"mesh": {"tp": 2}, "train": {"recompute": "selective"}}),
    "tp in fsdp": ("mamba2", 4, {"mesh": {"tp": 2}, "train": {"batch": 4}}),
    "tp, further tokens": ("multi-token", 2, {"mesh": {"tp": 2}}),
    "ep": ("attention moe", 2, {"mesh": {"ep": 2}, "train": {"batch": 4}}),
    "ep, recomputed": ("zaya", 2, {"mesh": {"ep": 2}, "train": {"batch": 2, "recompute": "full", "precision": "bf16"}}),
    "ep and copies": ("zaya", 4, {"mesh": {"ep": 2}, "train": {"batch": 4}}),
    "tp within experts": ("attention moe", 2, {"mesh": {"tp": 2, "expert_tensor": True}}),
    "tp within spread experts": ("every expert", 4, {"mesh": {"tp": 2, "ep": 2, "expert_tensor": True}, "train": {"batch": 2}}),
    "cp": ("gated delta net", 2, {"mesh": {"cp": 2}}),
    "cp of states": ("mamba2", 2, {"mesh": {"cp": 2}, "train": {"precision": "bf16"}}),
    "cp of scans": ("mamba", 2, {"mesh": {"cp": 2}}),
    "cp of gla": ("gla", 2, {"mesh": {"cp": 2}, "train": {"recompute": "full"}}),
    "cp of cca": ("zaya", 2, {"mesh": {"cp": 2}}),
    "cp, further tokens": ("multi-token", 2, {"mesh": {"cp": 2}}),
    "ring": ("attention moe", 2, {"mesh": {"cp": 2, "context": "ring"}, "train": {"precision": "bf16"}}),
    "pp": ("gla", 2, {"mesh": {"pp": 2}, "train": {"batch": 3}}),
    "pp, tied": ("zaya", 2, {"mesh": {"pp": 2}, "train": {"batch": 4}}),
    "pp in a V": ("zaya", 2, {"mesh": {"pp": 2, "pp_schedule": "zbv", "pp_layers": [1, 1, 1, 0]}, "train": {"batch": 4}}),
    "pp with fsdp": ("gated delta net", 4, {"mesh": {"pp": 2}, "train": {"batch": 8}}),
    "pp with tp": ("attention moe", 4, {"mesh": {"pp": 2, "tp": 2}, "train": {"batch": 2}}),
    "muon": ("multi-token", 1, {"optimizer": {"kind": "muon"}}),
    "muon in fsdp": ("attention moe", 2, {"optimizer": {"kind": "muon", "per_head": True}, "train": {"batch": 2}}),
    "muon with tp in hsdp": (
        "gated delta net", 4,
        {"optimizer": {"kind": "muon", "precision": "fp32"}, "mesh": {"tp": 2, "replicate": 2}, "train": {"batch": 4}},
    ),
    "muon with ep": (
        "zaya", 2, {"optimizer": {"kind": "muon", "adamw": ["*.router.*"]}, "mesh": {"ep": 2}, "train": {"batch": 2}},
    ),
    "muon with pp": ("union hourglass", 2, {"optimizer": {"kind": "muon"}, "mesh": {"pp": 2}, "train": {"batch": 2}}),
    "lamb in fsdp": ("zaya", 2, {"optimizer": {"kind": "lamb"}, "train": {"batch": 2}}),
    "lamb with pp and tp": ("gla", 4, {"optimizer": {"kind": "lamb"}, "mesh": {"pp": 2, "tp": 2}, "train": {"batch": 2}}),
    "sgd in fsdp": ("gla", 2, {"optimizer": {"kind": "sgd"}, "train": {"batch": 2}}),
    "sgd with ep": ("attention moe", 2, {"optimizer": {"kind": "sgd"}, "mesh": {"ep": 2}, "train": {"batch": 2}}),
    "sgd without momentum": ("gla", 1, {"optimizer": {"kind": "sgd", "momentum": 0.0}}),
    "zero 1": ("attention moe", 2, {"engine": {"kind": "deepspeed", "stage": 1}, "train": {"batch": 4}}),
    "zero 2": ("attention moe", 2, {"engine": {"kind": "deepspeed", "stage": 2}, "train": {"batch": 4}}),
    "zero 3": ("gla", 2, {"engine": {"kind": "deepspeed", "stage": 3, "keep_whole": 1000}, "train": {"batch": 4}}),
}  # fmt: skip


# One of each kind; the others in a campaign.
USUAL = (
    "fsdp, joined",
    "hsdp",
    "ddp",
    "tp 4 with copies of key heads",
    "tp, recomputed",
    "ep, recomputed",
    "tp within spread experts",
    "cp of cca",
    "ring",
    "pp, tied",
    "muon with tp in hsdp",
    "lamb in fsdp",
    "sgd with ep",
    "zero 2",
)


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.campaign) for name in LAYOUTS]
)
def test_against_a_real_engine(name: str) -> None:
    model, world, sections = LAYOUTS[name]
    run = config(model, **sections)
    raw = run.model_dump(mode="json")
    seen: list[Seen] = run_ranks(step, world, raw, preload=TRAINING)
    grid = run.mesh.grid(world)
    costs = rank_costs(ModelCosts.of(run), run, grid)
    for rank, real in enumerate(seen):
        stage = costs.stages[grid.coordinate("pp", rank)]
        if grid.coordinate("shard_cp", rank) == 0:  # no other rank's shard is larger
            assert (real.weights, real.optimizer) == (stage.weights, stage.optimizer)
            assert real.gradients == stage.gradients
        counted = told(stage.collectives, grid, rank)
        real_ones = {key: seen[rank].messages[key] for key in seen[rank].messages}
        for key, (axis, calls, _) in counted.items():
            if key.op == "all_to_all" or axis == "tp":
                # Loads of experts are as they are, and shards of what is summed over tp: the mean of the stage's ranks.
                alike = grid.ranks("dp_cp_tp", rank)
                each = [seen[other].messages.get(Key(key.op, group(grid, axis, other)), (0, 0))[1] for other in alike]
                real_ones[key] = (real_ones[key][0], sum(each) / len(each))
            if run.engine.kind == "deepspeed":  # which fetches parameters in as many calls as it likes
                real_ones[key] = (calls, real_ones[key][1])
        assert {key: (calls, total) for key, (_, calls, total) in counted.items()} == real_ones


def group(grid: Grid, axis: str, rank: int) -> tuple[int, ...]:
    return tuple(range(grid.world)) if axis == "world" else tuple(grid.ranks(axis, rank))


def told(collectives: tuple[Collective, ...], grid: Grid, rank: int) -> dict[Key, tuple[str, float, float]]:
    """(axis, calls, bytes) that are counted for a rank, by kind and group."""
    found: dict[Key, tuple[str, float, float]] = {}
    for one in collectives:
        if one.what not in ("counts of targets", "loss", "loads of routers"):  # not the engine's
            key = Key(one.op, group(grid, one.axis, rank))
            _, calls, total = found.get(key, ("", 0.0, 0.0))
            found[key] = (one.axis, calls + one.calls, total + one.total)
    return found
