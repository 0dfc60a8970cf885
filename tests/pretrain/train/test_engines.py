"""One rank, two ranks FSDP2 and two ranks ZeRO-1/2 train the same model on the same global batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.train.small_run import checkpoint_tensors, losses, records, train_on_rank
from tests.ranks import TRAINING, run_ranks

# Enough layers for four stages, and all that travels between them: routers' states, auxiliary losses, the token after next.
DEEP = (
    "model.layers=[gdn + moe, attention + zaya x2]",
    "model.ffns={moe: {kind: moe, experts: 4, top_k: 2, hidden: 16, z_loss: 0.01},"
    " zaya: {kind: zaya_moe, experts: 4, hidden: 16, router_width: 12}}",
    "model.multi_token={layer: attention + moe}",
)
# Experts are fewer than ranks: FSDP2 would fill them up to as many, so they are cut along another dim.
FEW = (
    "model.layers=[gdn + moe, attention + zaya]",
    "model.ffns={moe: {kind: moe, experts: 3, top_k: 2, hidden: 16, z_loss: 0.01},"
    " zaya: {kind: zaya_moe, experts: 2, hidden: 16, router_width: 12}}",
)
LAYOUTS = {
    "fsdp2": (2, ()),
    "fsdp2 reducing each micro-batch": (
        2,
        ("engine.reduce_each_micro_batch=true", "engine.reshard_after_forward=false"),
    ),
    "fsdp2 on four ranks": (4, ()),
    "fsdp2, few experts": (4, FEW),
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
    "tensor x context, multi-token": (4, ("mesh.tp=2", "mesh.cp=2", *DEEP)),
    "tensor x experts x data": (4, ("mesh.tp=2", "mesh.ep=4")),
    "context x data, experts": (4, ("mesh.cp=2", "mesh.ep=2")),
    "pipeline": (2, ("mesh.pp=2",)),
    "pipeline zbv": (2, ("mesh.pp=2", "mesh.pp_schedule=zbv", *DEEP)),
    "pipeline interleaved x data": (4, ("mesh.pp=2", "mesh.pp_schedule=interleaved", *DEEP)),
    "pipeline zbv, recomputing, x replicas": (
        4,
        ("mesh.pp=2", "mesh.pp_schedule=zbv", "train.recompute=full", "mesh.replicate=2", *DEEP),
    ),
    "pipeline x context": (4, ("mesh.pp=2", "mesh.cp=2")),
    "pipeline x tensor": (4, ("mesh.pp=2", "mesh.tp=2")),
    "pipeline x experts": (4, ("mesh.pp=2", "mesh.ep=2")),
    "larger micro-batch": (1, ("train.micro_batch=4",)),
}
# Only in a campaign: what the others do together, or with a harder model; layouts that other files train in every run.
LONG = (
    "fsdp2 on four ranks", "zero1", "zero2 on one rank", "fsdp2 recomputing", "tensor", "experts", "context", "tensor x context",
    "pipeline", "pipeline zbv", "pipeline x tensor",
)  # fmt: skip
STEPS = "train.steps=4"


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """The run of a model on one rank, made when first asked for."""

    @cache
    def of(model: tuple[str, ...]) -> Path:
        run = tmp_path_factory.mktemp("one")
        run_ranks(train_on_rank, 1, run, corpus, (STEPS, "train.precision=fp32", *model), preload=TRAINING)
        return run

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.campaign if name in LONG else []) for name in LAYOUTS]
)
def test_fp32_training_agrees_with_one_rank(layout: str, one_rank: Any, corpus: Path, tmp_path: Path) -> None:
    """Sums in another order differ by rounding only: losses to 2e-5 and weights to 1e-4 of their scale after four steps."""
    world, overrides = LAYOUTS[layout]
    alone = one_rank(tuple(override for override in overrides if override.startswith("model.")))
    run_ranks(train_on_rank, world, tmp_path, corpus, (STEPS, "train.precision=fp32", *overrides), preload=TRAINING)
    for ours, theirs in zip(records(tmp_path), records(alone), strict=True):
        torch.testing.assert_close(
            [ours["loss"], ours["grad_norm"]], [theirs["loss"], theirs["grad_norm"]], rtol=2e-5, atol=0
        )
        assert ours["tokens"] == theirs["tokens"]
        assert list(ours["load_entropy"]) == list(theirs["load_entropy"])
        torch.testing.assert_close(ours["load_entropy"], theirs["load_entropy"], rtol=0, atol=1e-3)
    (validated,), (expected_validated,) = (records(run, "validation.jsonl") for run in (tmp_path, alone))
    torch.testing.assert_close(validated, expected_validated, rtol=2e-5, atol=0)
    expected, found = (checkpoint_tensors(run / "checkpoints/step_00000004") for run in (alone, tmp_path))
    assert {n for n in found if not n.startswith("rank/")} == {n for n in expected if not n.startswith("rank/")}
    for name, tensor in found.items():
        if name.startswith("model/"):
            scale = expected[name].abs().max().clamp(min=1e-3)
            assert (tensor - expected[name]).abs().max() / scale < 1e-3, name


def test_a_run_goes_on_through_pipelines(one_rank: Any, corpus: Path, tmp_path: Path) -> None:
    """A pipeline in a V, one rank, another pipeline: the same losses as one rank all along."""
    alone, fp32 = one_rank(DEEP), (STEPS, "train.precision=fp32", *DEEP)
    pipeline = ("mesh.pp=2", "mesh.pp_schedule=zbv")
    run_ranks(train_on_rank, 2, tmp_path, corpus, (*fp32, *pipeline), 1, preload=TRAINING)
    run_ranks(train_on_rank, 1, tmp_path, corpus, fp32, 2, preload=TRAINING)
    run_ranks(train_on_rank, 2, tmp_path, corpus, (*fp32, *pipeline), 3, preload=TRAINING)
    run_ranks(train_on_rank, 2, tmp_path, corpus, (*fp32, "mesh.pp=2"), preload=TRAINING)
    torch.testing.assert_close(losses(tmp_path), losses(alone), rtol=2e-5, atol=0)


def test_bf16_training_agrees_with_one_rank(corpus: Path, tmp_path: Path) -> None:
    """In bf16 a rounding may also send a token to another expert: losses agree to 1e-2 over four steps."""
    runs = {"one": (1, ()), "fsdp2": (2, ()), "zero2": (2, ("engine.kind=deepspeed",))}
    curves = {}
    for name, (world, overrides) in runs.items():
        run_ranks(train_on_rank, world, tmp_path / name, corpus, (STEPS, *overrides), preload=TRAINING)
        curves[name] = losses(tmp_path / name)
    torch.testing.assert_close(curves["fsdp2"], curves["one"], rtol=1e-2, atol=0)
    torch.testing.assert_close(curves["zero2"], curves["one"], rtol=1e-2, atol=0)
