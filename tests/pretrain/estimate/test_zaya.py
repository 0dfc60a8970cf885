"""ZAYA1-8B (configs/models/zaya1_8b.yaml) on 1024 MI300X: the numbers of its papers, and of a calculation by hand."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import yaml

from parallel.engines.placement import dim_to_cut
from pretrain.config import RunConfig
from pretrain.estimate.layout import RankCosts, rank_costs
from pretrain.estimate.model import ModelCosts
from pretrain.model.files import FOLDER

STORED = 8_840_478_544


def config(**sections: object) -> RunConfig:
    raw = yaml.safe_load((Path(FOLDER) / "zaya1_8b.yaml").read_text())["model"]
    train = {"steps": 1, "batch": 4096, **sections.pop("train", {})}  # type: ignore[dict-item]
    data = {"path": "corpus", "sequence_length": 4096}
    return RunConfig.model_validate({"run": "run", "model": raw, "data": data, "train": train, **sections})


@pytest.fixture(scope="module")
def model() -> ModelCosts:
    return ModelCosts.of(config())


def on(model: ModelCosts, world: int = 1024, **sections: object) -> RankCosts:
    run = config(**sections)
    return rank_costs(model, run, run.mesh.grid(world))


def total(costs: RankCosts, op: str, axis: str | None = None) -> float:
    return sum(c.total for c in costs.collectives if c.op == op and axis in (None, c.axis))


def test_parameters(model: ModelCosts) -> None:
    assert model.parameters == STORED
    assert model.parameters - model.embeddings == 8_303_345_488  # 8.303 B
    assert model.active - model.embeddings == 753_598_288  # 0.7536 B
    assert (
        sum(kind.label == "cca + moe" for kind in model.kinds) == 2
    )  # the first one's router has no state to average with


def test_zero_by_hand(model: ModelCosts) -> None:
    """ZeRO-1 as in the sheet: every parameter gathered once in bf16 (17.7 GB) and reduce-scattered once in fp32 (35.4 GB).

    Ours gathers fp32, twice what the sheet has in bytes for the same elements.
    """
    costs = on(model, engine={"kind": "deepspeed", "stage": 1})
    elements = total(costs, "all_gather") / 4
    assert 2 * elements == pytest.approx(17.7e9, rel=2e-3) and 4 * elements == pytest.approx(35.4e9, rel=2e-3)
    assert elements == pytest.approx(STORED, rel=1e-5)
    assert total(costs, "all_reduce", "world") == pytest.approx(35.4e9, rel=2e-3)  # which DeepSpeed reduces with


def filled(shape: torch.Size) -> int:
    """Elements of a parameter that FSDP2 has filled up for 1024 ranks, along the dim that the engine cuts."""
    size = shape[dim_to_cut(shape, 1024)]
    return -(-size // 1024) * 1024 * (shape.numel() // size)


def test_sharded(model: ModelCosts) -> None:
    """FSDP2 cuts all parameters over all ranks, each filled up; experts that ep spreads it leaves alone."""
    named = dict(model.model.named_parameters())
    assert total(on(model), "reduce_scatter") == 4 * sum(filled(p.shape) for p in named.values())
    dense = sum(filled(p.shape) for name, p in named.items() if not name.endswith((".gate_up", ".down")))
    spread = on(model, mesh={"ep": 16})
    assert total(spread, "reduce_scatter") == 4 * dense
    assert total(spread, "all_reduce", "edp") == 4 * 40 * 12_582_912


def test_at_a_hundred_thousand_ranks(model: ModelCosts) -> None:
    """Exact there too, and in well under a millisecond a call once the layers have been followed (printed, not judged)."""
    world = 98_304
    run = config(train={"batch": world * 2}, mesh={"replicate": world // 1024})
    grid = run.mesh.grid(world)
    costs = rank_costs(model, run, grid)
    begin = time.perf_counter()
    assert rank_costs(model, run, grid) == costs
    print(f"{1e6 * (time.perf_counter() - begin):.0f} us")
    assert costs.micro_batches == 2 and grid.world == world
    same = on(model, train={"batch": 2048})
    assert costs.weights == same.weights and costs.flops == same.flops
    assert total(costs, "all_reduce", "replicate") == total(costs, "reduce_scatter") / 1024
