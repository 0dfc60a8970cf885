"""Parameters that FSDP2 gathers, and its buffers, as counted against the bytes that are really alive on ranks of gloo."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.estimate.layout import rank_costs
from pretrain.estimate.model import ModelCosts
from tests.pretrain.estimate.estimate_ranks import lived
from tests.pretrain.estimate.settings import config
from tests.ranks import TRAINING, run_ranks

ENGINES: list[dict[str, Any]] = [
    {"prefetch": 3},
    {"reshard_after_forward": False},
    {},
    {"prefetch": 20},  # more than there are layers
]
# (ranks, sections of the run, the most that the estimate may be of what was alive)
LAYOUTS: dict[str, tuple[int, dict[str, Any], float]] = {
    # Whose gradients come layer by layer, while fewer and fewer layers are left to gather: the most of each is counted.
    "one micro-batch": (2, {"train": {"batch": 2}}, 1.3),
    "accumulated": (2, {"train": {"batch": 4}}, 1.06),
    "reduced each time": (2, {"train": {"batch": 4}, "engine": {"reduce_each_micro_batch": True}}, 1.03),
    "over a pipeline": (4, {"train": {"batch": 16}, "mesh": {"pp": 2}}, 1.15),
}
LEAST = 0.92  # a message's buffer of half a layer may live on until gloo's thread lets go of it


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("reduced each time", ENGINES[:2]),
        *(pytest.param(name, ENGINES, marks=pytest.mark.campaign) for name in LAYOUTS),
    ],
)
def test_peak(name: str, engines: list[dict[str, Any]]) -> None:
    world, sections, most = LAYOUTS[name]
    own = sections.get("engine", {})
    runs = [config("wide", length=4, **sections | {"engine": own | engine}) for engine in engines]
    seen: list[list[int]] = run_ranks(lived, world, [run.model_dump(mode="json") for run in runs], preload=TRAINING)
    grid = runs[0].mesh.grid(world)
    for index, run in enumerate(runs):
        costs = rank_costs(ModelCosts.of(run), run, grid)
        real = max(each[index] for each in seen)
        counted = costs.peak - costs.weights - costs.optimizer
        print(f"{engines[index]}: {counted / real:.3f}")
        assert LEAST <= counted / real <= most


def test_each_layer_gathered_ahead_costs_its_parameters() -> None:
    buffers = []
    for depth in (1, 2, 4, 5, 6):
        run = config("wide", length=4, engine={"prefetch": depth}, train={"batch": 4})
        model = ModelCosts.of(run)
        buffers.append(rank_costs(model, run, run.mesh.grid(2)).buffers)
    layer = 4 * sum(parameter.numel() for parameter in model.layers[0].block.parameters())
    assert [more - buffers[0] for more in buffers] == [
        0,
        layer,
        3 * layer,
        4 * layer,
        4 * layer,
    ]  # of six, five are left
