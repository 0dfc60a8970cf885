"""A budget of memory: what is computed again makes the step fit, by the bytes that are really alive, and for few FLOPs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from parallel.recompute import Mode, apply_recompute
from pretrain.config import ConfigError, RunConfig
from pretrain.estimate.budget import GIB, Choice, again, curve, fit, with_modes
from pretrain.estimate.layout import rank_costs
from pretrain.estimate.memory import Memory
from pretrain.estimate.model import ModelCosts
from pretrain.estimate.work import StepWork
from pretrain.model.decoder import Decoder
from pretrain.train import layout
from tests.pretrain.estimate.counted import counter, still
from tests.pretrain.estimate.settings import batches, config

MODELS = ("gated delta net", "attention moe")


def of(name: str, budget: float | None = None, **sections: Any) -> RunConfig:
    """budget: bytes."""
    train = {"micro_batch": 2, "batch": 2, "memory_budget": None if budget is None else budget / GIB}
    return config(name, width=128, length=512, train=train | sections.pop("train", {}), **sections)


def extremes(run: RunConfig) -> tuple[float, float]:
    """Peaks (with everything computed again, with nothing)."""
    model, grid = ModelCosts.of(run), run.mesh.grid(1)
    full = run.model_copy(update={"train": run.train.model_copy(update={"recompute": "full"})})
    return rank_costs(model, full, grid).peak, rank_costs(model, run, grid).peak


def chosen(run: RunConfig) -> Choice:
    return fit(ModelCosts.of(run), run, run.mesh.grid(1))


def lived(run: RunConfig) -> int:
    """The most bytes at a time in a step, besides parameters, gradients that are there before, and optimizer."""
    torch.manual_seed(0)
    model = Decoder(run.model).train()
    for block, mode in zip(model.layers(), layout.modes(model, run, run.mesh.grid(1)), strict=True):
        apply_recompute([block], mode)
    (batch,) = batches(run)
    with Memory() as memory:
        memory.ignore([*model.parameters(), *model.buffers()])
        loss = model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens)
        (loss / 100).backward()
        return memory.peak


# Each model and each share once; the other pairs in a campaign.
@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(name, share, marks=[] if (name == MODELS[0]) == (share < 0.5) else pytest.mark.campaign)
        for name, share in product(MODELS, (0.25, 0.7))
    ],
)
def test_a_step_fits_its_budget(name: str, share: float) -> None:
    low, high = extremes(of(name))
    budget = low + share * (high - low)
    run = of(name, budget)
    costs = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1))
    steady = costs.weights + costs.optimizer
    real = steady + lived(run)
    assert costs.peak <= budget
    assert real <= 1.02 * budget  # as exact as the estimate is
    assert costs.recomputed > 0
    assert any(mode != "full" for mode in chosen(run).modes)  # no more is computed again than is asked for


def test_what_is_computed_again_is_counted() -> None:
    """By a run's metrics as by its plan, and as torch counts it."""
    low, high = extremes(of("attention moe"))
    run = of("attention moe", low + 0.5 * (high - low))
    costs, batch = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1)), *batches(run)
    work = StepWork(run, run.mesh.grid(1), gpu=False).of([batch])
    assert (work.useful, work.recomputed, work.remade) == (costs.flops, costs.recomputed, costs.remade)
    model = Decoder(run.model).train()
    chosen = layout.modes(model, run, run.mesh.grid(1))
    for block, mode in zip(model.layers(), chosen, strict=True):
        apply_recompute([block], mode)
    with still(), counter() as seen:
        model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens).backward()
    assert work.hardware == seen.get_total_flops() and len(set(chosen)) > 1


def test_few_flops_are_computed_again() -> None:
    """Of all combinations of ways that fit, none is cheaper by more than one layer's worth."""
    plain = of("gla")
    low, high = extremes(plain)
    budget = low + 0.6 * (high - low)
    run, model, grid = of("gla", budget), ModelCosts.of(plain), plain.mesh.grid(1)
    ways: tuple[Mode, ...] = ("none", "selective", "ffn", "full")
    cost = {mode: again(model.layers[0], mode, model, plain, grid, 1024)[1] for mode in ways}
    fitting = [
        sum(cost[mode] for mode in modes)
        for modes in product(ways, repeat=3)
        if list(modes) == sorted(modes, key=ways.index, reverse=True)  # alike layers: one order of each choice
        and rank_costs(with_modes(model, modes), plain, grid).peak <= budget
    ]
    assert rank_costs(model, run, grid).recomputed <= min(fitting) + cost["full"]


def test_the_curve_takes_the_cheapest_bytes_first() -> None:
    # From nothing, `ffn` frees a byte for 1, `selective` for 2, `mixer` for 6; from ffn on, `full` costs 50 / 8 a byte, more
    # than mixer's 20 / 5; from mixer on, full costs 10.
    points: Any = [(4, 8, "selective"), (2, 2, "ffn"), (7, 22, "mixer"), (10, 52, "full"), (3, 60, "none")]
    assert curve(points) == [(1.0, "ffn"), (3.0, "selective"), (14 / 3, "mixer"), (10.0, "full")]
    assert curve([(4, 0, "selective"), (2, 2, "ffn"), (9, 5, "full")]) == [(0.0, "selective"), (1.0, "full")]


def test_more_than_enough_changes_nothing_and_too_little_is_refused() -> None:
    low, high = extremes(of("gla"))
    assert chosen(of("gla", 1.01 * high)).modes == ("none",) * 3
    assert chosen(of("gla", 1.001 * low)).peak[0] <= 1.001 * low
    with pytest.raises(
        ConfigError, match=r"with all layers computed again a step still takes .* GiB by estimate; give at least"
    ):
        layout.check(of("gla", 0.5 * low), 1)
    with pytest.raises(ConfigError, match="leave one of them out"):
        layout.check(of("gla", high, train={"recompute": "full"}), 1)


def test_the_earliest_of_alike_layers_go_first() -> None:
    low, high = extremes(of("gla"))
    modes = chosen(of("gla", low + 0.5 * (high - low))).modes
    freed = ["none", "selective", "ffn", "mixer", "full"]
    ranks = [freed.index(mode) for mode in modes]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1]


def test_each_pipeline_rank_chooses_for_its_layers() -> None:
    """The first rank of 1F1B holds the activations of more micro-batches than the last one, and computes more of them again."""
    layers = {"train": {"micro_batch": 1, "batch": 4}, "mesh": {"pp": 2}}
    plain = of("mamba2", **layers)
    peaks = [stage.peak for stage in rank_costs(ModelCosts.of(plain), plain, plain.mesh.grid(2)).stages]
    budget = 0.9 * max(peaks)
    run = of("mamba2", budget, **layers)
    choice = fit(ModelCosts.of(run), run, run.mesh.grid(2))
    assert max(choice.peak) <= budget and choice.before == tuple(peaks)
    for rank, stage in enumerate(rank_costs(ModelCosts.of(plain), plain, plain.mesh.grid(2)).stages):
        touched = any(choice.modes[layer] != "none" for layer in stage.layers)
        assert touched == (peaks[rank] > budget)
