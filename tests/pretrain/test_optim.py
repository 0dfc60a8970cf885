"""Learning-rate schedules by value, and which parameters decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from pretrain.optim.adamw import AdamWConfig, split_by_decay
from pretrain.optim.schedules import CosineConfig, WarmupStableDecayConfig
from tests.pretrain.small import decoder


def test_cosine_by_value() -> None:
    schedule = CosineConfig(warmup=4, final=0.1)
    factors = [schedule.factor(step, 104) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[54] == pytest.approx(0.55)  # half-way down
    assert factors[104] == pytest.approx(0.1)
    assert factors[29] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a >= b for a, b in pairwise(factors[4:]))


def test_warmup_stable_decay_by_value() -> None:
    schedule = WarmupStableDecayConfig(warmup=10, decay=0.2, final=0.0)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(factors[10:81]) == {1.0}
    assert factors[81:] == pytest.approx([(100 - step) / 20 for step in range(81, 101)])
    assert WarmupStableDecayConfig(warmup=0, decay=0.5, final=0.2).factor(75, 100) == pytest.approx(0.6)


@pytest.mark.parametrize("schedule", [CosineConfig(warmup=0), WarmupStableDecayConfig(warmup=0, decay=0.0)])
def test_no_warmup_starts_at_the_peak(schedule: CosineConfig | WarmupStableDecayConfig) -> None:
    assert schedule.factor(0, 10) == 1.0


def test_matrices_decay_and_nothing_else() -> None:
    model = decoder(tie_embeddings=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = ([names[parameter] for parameter in group] for group in split_by_decay(model))
    assert len(decayed) + len(others) == len(names)
    parts = {name.split(".", 2)[-1] for name in decayed}
    assert parts >= {
        "mixer.qkv.weight",
        "mixer.out.weight",
        "ffn.gate_up",
        "ffn.down",
        "ffn.router.weight",
    }
    assert "head.weight" in decayed
    kept = {name.split(".")[-1] for name in others}
    assert {"conv", "A_log", "dt_bias", "q_norm", "norm"} <= kept and "embedding.weight" in others


def test_three_steps_of_adamw_by_hand() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = AdamWConfig(lr=0.1, beta1=0.6, beta2=0.9, eps=0.5, weight_decay=0.3).build(model)  # type: ignore[arg-type]
    weight = model.weight.detach().double()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in (1, 2, 3):
        model.weight.grad = torch.randn(2, 3)
        gradient = model.weight.grad.double()
        optimizer.step()
        m, v = 0.6 * m + 0.4 * gradient, 0.9 * v + 0.1 * gradient**2
        update = m / (1 - 0.6**step) / ((v / (1 - 0.9**step)).sqrt() + 0.5)
        weight = weight * (1 - 0.1 * 0.3) - 0.1 * update
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_update_is_decoupled_adamw() -> None:
    """One step by hand: the first update of Adam is the gradient's sign, decay multiplies the weight."""
    model = torch.nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = AdamWConfig(lr=0.1, weight_decay=0.5, eps=1e-12).build(model)  # type: ignore[arg-type]
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -3.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(model.bias.detach(), bias + 0.1)
