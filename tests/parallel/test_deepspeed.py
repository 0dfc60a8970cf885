"""ZeRO 1-3, with and without offload, over data, context and expert ranks: the losses and weights of one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pretrain.train.small_run import checkpoint_tensors, losses, train_on_rank
from tests.ranks import run_ranks

PRELOAD = ("deepspeed", "megatron.core.datasets.indexed_dataset")
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
    run_ranks(train_on_rank, 1, run, corpus, (*SETTINGS, "train.steps=4"), preload=PRELOAD)
    assert min(norms(run)) > 0.5  # so that every step is clipped
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_agrees_with_one_rank(layout: str, one_rank: Path, corpus: Path, tmp_path: Path) -> None:
    """Sums in another order differ by rounding only."""
    world, overrides = LAYOUTS[layout]
    run_ranks(train_on_rank, world, tmp_path, corpus, (*SETTINGS, "train.steps=4", *overrides), preload=PRELOAD)
    torch.testing.assert_close(losses(tmp_path), losses(one_rank), rtol=2e-5, atol=0)
    torch.testing.assert_close(norms(tmp_path), norms(one_rank), rtol=1e-4, atol=0)
    same_tensors(tmp_path, one_rank, 4)


def test_a_checkpoint_crosses_engines_and_layouts(corpus: Path, tmp_path: Path) -> None:
    """Six steps, each under another engine or layout, are those of one rank that was never interrupted."""
    settings = (*SETTINGS, "train.steps=6", "train.batch=6")
    run_ranks(train_on_rank, 1, tmp_path / "one", corpus, settings, preload=PRELOAD)
    legs = (
        (3, zero(3)),  # no parameter's size is a multiple of three: partitions end in padding
        (2, ()),  # FSDP2
        (2, zero(1, "mesh.ep=2")),
        (1, ()),
        (2, zero(2, "engine.offload=optimizer")),
        (2, zero(3, "engine.keep_whole=1000")),  # small ones whole, others not
    )
    for step, (world, overrides) in enumerate(legs, start=1):
        run_ranks(train_on_rank, world, tmp_path / "many", corpus, (*settings, *overrides), step, preload=PRELOAD)
    torch.testing.assert_close(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=2e-5, atol=0)
    same_tensors(tmp_path / "many", tmp_path / "one", 6)


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
