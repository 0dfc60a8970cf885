"""One rank, two ranks FSDP2 and two ranks ZeRO-1/2 train the same model on the same global batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pretrain.train.small_run import checkpoint_tensors, losses, train_on_rank
from tests.ranks import run_ranks

PRELOAD = ("deepspeed", "megatron.core.datasets.indexed_dataset")
LAYOUTS = {
    "fsdp2": (2, ()),
    "fsdp2 reducing each micro-batch": (
        2,
        ("engine.reduce_each_micro_batch=true", "engine.reshard_after_forward=false"),
    ),
    "fsdp2 on four ranks": (4, ()),
    "zero1": (2, ("engine.kind=deepspeed", "engine.stage=1")),
    "zero2": (2, ("engine.kind=deepspeed", "engine.stage=2")),
    "zero2 on one rank": (1, ("engine.kind=deepspeed",)),
    "fsdp2 recomputing": (2, ("train.recompute=full",)),
    "zero2 recomputing some": (2, ("engine.kind=deepspeed", "train.recompute=selective")),
    "replicas": (2, ("mesh.replicate=2",)),
    "hybrid sharding": (4, ("mesh.replicate=2",)),
    "tensor": (2, ("mesh.tp=2",)),
    "experts": (2, ("mesh.ep=2",)),
    "context": (2, ("mesh.cp=2",)),
    "tensor x context": (4, ("mesh.tp=2", "mesh.cp=2")),
    "tensor x experts x data": (4, ("mesh.tp=2", "mesh.ep=4")),
    "context x data, experts": (4, ("mesh.cp=2", "mesh.ep=2")),
    "larger micro-batch": (1, ("train.micro_batch=4",)),
}
STEPS = "train.steps=4"


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one")
    run_ranks(train_on_rank, 1, run, corpus, (STEPS, "train.precision=fp32"), preload=PRELOAD)
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_training_agrees_with_one_rank(layout: str, one_rank: Path, corpus: Path, tmp_path: Path) -> None:
    """Sums in another order differ by rounding only: losses to 2e-5 and weights to 1e-4 of their scale after four steps."""
    world, overrides = LAYOUTS[layout]
    run_ranks(train_on_rank, world, tmp_path, corpus, (STEPS, "train.precision=fp32", *overrides), preload=PRELOAD)
    torch.testing.assert_close(losses(tmp_path), losses(one_rank), rtol=2e-5, atol=0)
    expected = checkpoint_tensors(one_rank / "checkpoints/step_00000004")
    for name, tensor in checkpoint_tensors(tmp_path / "checkpoints/step_00000004").items():
        if name.startswith("model/"):
            scale = expected[name].abs().max().clamp(min=1e-3)
            assert (tensor - expected[name]).abs().max() / scale < 1e-3, name


def test_bf16_training_agrees_with_one_rank(corpus: Path, tmp_path: Path) -> None:
    """In bf16 a rounding may also send a token to another expert: losses agree to 1e-2 over four steps."""
    runs = {"one": (1, ()), "fsdp2": (2, ()), "zero2": (2, ("engine.kind=deepspeed",))}
    curves = {}
    for name, (world, overrides) in runs.items():
        run_ranks(train_on_rank, world, tmp_path / name, corpus, (STEPS, *overrides), preload=PRELOAD)
        curves[name] = losses(tmp_path / name)
    torch.testing.assert_close(curves["fsdp2"], curves["one"], rtol=1e-2, atol=0)
    torch.testing.assert_close(curves["zero2"], curves["one"], rtol=1e-2, atol=0)
    assert curves["one"][-1] < curves["one"][0]
