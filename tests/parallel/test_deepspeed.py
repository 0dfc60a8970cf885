"""ZeRO 1-3, with and without offload, over data, context and expert ranks: the losses and weights of one rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engines.deepspeed import DeepSpeedConfig
from parallel.engines.fragment import Fragment
from parallel.grid import MeshConfig
from tests.parallel import deepspeed_ranks
from tests.pretrain.train.small_run import checkpoint_tensors, losses, train_on_rank
from tests.ranks import TRAINING, run_ranks

SETTINGS = ("train.precision=fp32", "train.clip=0.5")


def zero(stage: int, *overrides: str) -> tuple[str, ...]:
    # keep_whole=0: parameters this small would all stay whole.
    return (
        "engine.kind=deepspeed",
        f"engine.stage={stage}",
        *(["engine.keep_whole=0"] if stage == 3 else []),
        *overrides,
    )


LAYOUTS = {
    "zero3": (2, zero(3)),
    "zero3 offloading parameters": (2, zero(3, "engine.offload=parameters")),
    "zero2 offloading": (2, zero(2, "engine.offload=optimizer")),
    "zero2 x context": (2, zero(2, "mesh.cp=2")),
    "zero1 x experts": (2, zero(1, "mesh.ep=2")),
    "zero3 recomputing": (2, zero(3, "train.recompute=full")),
    "zero3 x context x data": (4, zero(3, "mesh.cp=2")),
    "zero2 x experts x data": (4, zero(2, "mesh.ep=2")),
    "zero1 x experts x context x data": (4, zero(1, "mesh.cp=2", "mesh.ep=4")),
}


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one")
    run_ranks(train_on_rank, 1, run, corpus, (*SETTINGS, "train.steps=4"), preload=TRAINING)
    assert min(norms(run)) > 0.5  # so that every step is clipped
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_agrees_with_one_rank(layout: str, one_rank: Path, corpus: Path, tmp_path: Path) -> None:
    """Sums in another order differ by rounding only."""
    world, overrides = LAYOUTS[layout]
    run_ranks(train_on_rank, world, tmp_path, corpus, (*SETTINGS, "train.steps=4", *overrides), preload=TRAINING)
    torch.testing.assert_close(losses(tmp_path), losses(one_rank), rtol=2e-5, atol=0)
    torch.testing.assert_close(norms(tmp_path), norms(one_rank), rtol=1e-4, atol=0)
    same_tensors(tmp_path, one_rank, 4)


def test_a_checkpoint_crosses_engines_and_layouts(corpus: Path, tmp_path: Path) -> None:
    """Six steps, each under another engine or layout, are those of one rank that was never interrupted."""
    settings = (*SETTINGS, "train.steps=6", "train.batch=6")
    run_ranks(train_on_rank, 1, tmp_path / "one", corpus, settings, preload=TRAINING)
    legs = (
        (3, zero(3)),  # no parameter's size is a multiple of three: partitions end in padding
        (2, ()),  # FSDP2
        (2, zero(1, "mesh.ep=2")),
        (1, ()),
        (2, zero(2, "engine.offload=optimizer")),
        (2, zero(3, "engine.keep_whole=1000")),  # small ones whole, others not
    )
    for step, (world, overrides) in enumerate(legs, start=1):
        run_ranks(train_on_rank, world, tmp_path / "many", corpus, (*settings, *overrides), step, preload=TRAINING)
    torch.testing.assert_close(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=2e-5, atol=0)
    same_tensors(tmp_path / "many", tmp_path / "one", 6)


# Weights that other modules than their own compute with, among the rest: tied ones, folded ones, halves of products.
MODELS = ["mixer mla", "ffn fused", "multi-token", "ZAYA1"]


def test_zero3_gathers_whatever_a_model_reaches_for() -> None:
    (alone,) = run_ranks(deepspeed_ranks.families, 1, MODELS, "torch", preload=TRAINING)
    first, second = run_ranks(deepspeed_ranks.families, 2, MODELS, "zero3", preload=TRAINING)
    for name, steps in alone.items():
        for (loss, norm), one, two in zip(steps, first[name], second[name], strict=True):
            assert one[0] + two[0] == pytest.approx(loss, rel=2e-6), name
            assert one[1] == two[1] == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize("where", ["blocks.1.ffn.gate_up", "norm.weight"])
def test_one_number_that_is_not_finite_stops_all_ranks_and_both_optimizers(where: str) -> None:
    for bad, good, counts in run_ranks(deepspeed_ranks.poisoned, 2, {"ep": 2}, where, preload=TRAINING):
        assert bad == (math.inf, [])
        assert 0 < good[0] < math.inf and {"blocks.1.ffn.gate_up", "norm.weight", "embedding.weight"} <= set(good[1])
        assert counts == {1.0}  # the skipped step is not counted, by either


def test_partitions_and_their_group() -> None:
    for timeout, share in run_ranks(deepspeed_ranks.patience, 2, preload=TRAINING):
        assert timeout == 77  # the job's
        assert share == 0.5


@pytest.mark.parametrize(
    ("sizes", "settings", "parts"),
    [
        ({"tp": 2}, {}, ("mesh.tp=2", "use engine.kind=torch, or mesh.tp=1", "mesh.cp")),
        ({"pp": 2}, {}, ("mesh.pp=2", "use engine.kind=torch, or mesh.pp=1")),
        ({"replicate": 2}, {}, ("mesh.replicate=2", "leave mesh.replicate out")),
        ({"ep": 2}, {"stage": 3}, ("mesh.ep=2", "use engine.stage=1 or 2")),
        ({"ep": 2}, {"offload": "optimizer"}, ("mesh.ep=2", "use engine.offload=none")),
        ({}, {"offload": "parameters"}, ("engine.stage=2", "use engine.stage=3, or engine.offload=optimizer")),
    ],
)
def test_what_has_no_place_in_flat_partitions_is_refused(sizes: Any, settings: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        DeepSpeedConfig(**settings).check(MeshConfig(**sizes).grid(4))
    for part in parts:
        assert part in str(caught.value)


def test_compiled_blocks_and_zero3_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"train\.compile=true: ZeRO stage 3"):
        DeepSpeedConfig(stage=3).check(MeshConfig().grid(2), compiled=True)
    DeepSpeedConfig(stage=2).check(MeshConfig(cp=2, ep=2).grid(4), compiled=True)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_runs_of_elements_as_blocks(shape: tuple[int, ...]) -> None:
    """Every run of every length: its blocks, written in their places, are the run."""
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = torch.zeros_like(whole)
            fragment = Fragment.at(start, whole.flatten()[start:end], whole.shape, "w")
            boxes = fragment.boxes()
            for box in boxes:
                box.of_whole(found).add_(fragment.block(box))
            expected = torch.zeros_like(whole).flatten()
            expected[start:end] = whole.flatten()[start:end]
            assert torch.equal(found.flatten(), expected) and len(boxes) <= max(1, 2 * len(shape) - 1)


def norms(run: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_tensors(run: Path, other: Path, step: int) -> None:
    """Weights and optimizer state to 1e-3 of their scale, and the same names (but for each rank's random stream)."""
    found, expected = (checkpoint_tensors(folder / f"checkpoints/step_{step:08d}") for folder in (run, other))
    names = {name for name in expected if not name.startswith("rank/")}
    assert names == {name for name in found if not name.startswith("rank/")}
    for name in names:
        scale = expected[name].abs().max().clamp(min=1e-3 if name.startswith("model/") else 1e-12)
        assert found[name].dtype == expected[name].dtype
        assert (found[name] - expected[name]).abs().max() / scale < 1e-3, name
