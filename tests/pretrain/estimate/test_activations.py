"""The memory of activations, as counted against the bytes that are really alive in a step on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kernels.rational import rational
from parallel.recompute import Recompute, apply_recompute
from pretrain.config import RunConfig
from pretrain.estimate.layout import rank_costs
from pretrain.estimate.memory import Memory
from pretrain.estimate.model import ModelCosts
from pretrain.estimate.stand_in import Notes, operators
from pretrain.model.decoder import Decoder
from tests.pretrain.estimate.settings import batches, config

SIX = ("attention moe", "gated delta net", "zaya", "gla", "union hourglass", "mamba2")
REST = ("mamba", "multi-token", "kat")


def lived(run: RunConfig) -> int:
    """The most bytes at a time, besides parameters, in the forward and backward passes of a step."""
    torch.manual_seed(0)
    model = Decoder(run.model).train()
    apply_recompute(list(model.layers()), run.train.recompute)
    bf16 = run.train.precision == "bf16"
    rows = batches(run)
    total = 0
    with Memory() as memory:
        memory.ignore([*model.parameters(), *model.buffers()])
        for batch in rows:
            context: Any = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
            with context:
                loss = model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens)
            (loss / 100).backward()
            total = memory.peak
    return total


EVERY = [
    pytest.param(name, precision, recompute, marks=() if usual else pytest.mark.campaign)
    for name in (*SIX, *REST)
    for precision in ("fp32", "bf16")
    for recompute in ("none", "full", "selective")
    for usual in [name in SIX and precision == "bf16" and recompute != "selective"]
]


@pytest.mark.parametrize(("name", "precision", "recompute"), EVERY)
def test_peak(name: str, precision: str, recompute: Recompute) -> None:
    train = {"precision": precision, "recompute": recompute, "micro_batch": 2, "batch": 2}
    run = config(name, width=128, length=512, train=train)
    costs = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1))
    real = lived(run)
    print(f"{costs.activations / real:.3f}")
    assert costs.activations == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_rational_activation_needs_for_a_moment(dtype: torch.dtype) -> None:
    """Bytes in the forward and in the backward pass, of the operator and of its stand-in."""
    x, a, b = torch.randn(3000, 96, dtype=dtype), torch.randn(1, 6), torch.randn(4, 4)
    seen: list[tuple[int, int]] = []
    for real in (True, False):
        given = [each.clone().requires_grad_() for each in (x, a, b)]
        memory = Memory()
        memory.ignore(given)
        with memory, nullcontext() if real else operators(Notes(memory, gpu=False)):
            y = rational(*given)
            forward = memory.peak
            dy = torch.ones_like(y)
            memory.begin()
            torch.autograd.backward(y, dy)
            seen.append((forward, memory.peak))
    block = 4 * 65536 * torch.get_num_threads() // 96 * 96
    assert seen[1][1] > y.numel() * y.itemsize * 2 + 5 * block * 0.99
    assert seen[1] == (pytest.approx(seen[0][0], rel=2e-3), pytest.approx(seen[0][1], rel=2e-3))


def test_gradients_that_add_up_are_there_besides() -> None:
    """Over several micro-batches: all gradients, and the activations of one."""
    train = {"micro_batch": 1, "batch": 3}
    run = config("gated delta net", width=128, length=512, train=train)
    costs = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1))
    assert costs.gradients == costs.weights == 4 * costs.parameters
    assert costs.peak == costs.weights + costs.gradients + costs.optimizer + costs.activations
    assert costs.activations + costs.gradients == pytest.approx(lived(run), rel=0.05)
