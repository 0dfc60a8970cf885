"""LAMB and SGD on one rank, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.config import RunConfig
from pretrain.equivalence.gate import short_run
from pretrain.model.decoder import DecoderConfig
from pretrain.optim.adamw import AdamWConfig
from pretrain.optim.lamb import LAMBConfig
from pretrain.optim.muon import MuonConfig
from pretrain.optim.sgd import SGDConfig
from tests.pretrain.small import MODEL, decoder


@pytest.mark.parametrize("largest", [None, 0.05])
def test_two_steps_of_lamb(largest: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    config = LAMBConfig(lr=0.1, weight_decay=0.3, eps=1e-3, beta1=0.8, beta2=0.9, largest=largest)
    optimizer = config.build(model)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    m = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    v = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in (1, 2):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient**2
            r = m[name] / (1 - 0.8**step) / ((v[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            if name == "weight":
                r = r + 0.3 * weights[name]
                ratio = (weights[name].norm() / r.norm()).item()
                r = r * (ratio if largest is None else min(ratio, largest))
            weights[name] = weights[name] - 0.1 * r
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)
    assert optimizer.layers == ["weight"]
    assert optimizer.ratios.tolist() == pytest.approx([ratio if largest is None else largest], rel=1e-5)


def test_each_expert_is_a_layer() -> None:
    """A larger gradient of one expert changes its own ratio, not the others'. Norms of zero give a ratio of one."""
    model = decoder()
    optimizer = LAMBConfig(weight_decay=0.0).build(model)
    assert [name for name in optimizer.layers if name.startswith("blocks.0.ffn.down")] == [
        f"blocks.0.ffn.down[{index}]" for index in range(4)
    ]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    down = model.get_parameter("blocks.0.ffn.down")
    with torch.no_grad():
        down[1] *= 3
        down[2] = 0
    optimizer.step()
    ratios = dict(zip(optimizer.layers, optimizer.ratios.tolist()))
    assert ratios["blocks.0.ffn.down[1]"] == pytest.approx(3 * ratios["blocks.0.ffn.down[0]"], rel=0.2)
    assert ratios["blocks.0.ffn.down[2]"] == 1.0
    assert "embedding.weight" in ratios and "norm.weight" not in ratios


def test_sgd_with_nesterov_momentum() -> None:
    model = nn.Linear(3, 2)
    optimizer = SGDConfig(lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.2).build(model)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight - 0.1 * 1.5 * (1 + 0.2 * weight))
    torch.testing.assert_close(model.bias.detach(), bias - 0.15)
    with pytest.raises(ValueError, match="nesterov=true needs momentum"):
        SGDConfig(momentum=0.0, nesterov=True)


def test_the_fused_form_of_adamw_computes_the_same() -> None:
    found = []
    for fused in (False, True):
        model = decoder()
        optimizer = AdamWConfig(lr=0.1, fused=fused).build(model)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert all(group["fused"] is fused for group in optimizer.param_groups)
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert AdamWConfig().build(decoder()).param_groups[0]["fused"]  # torch has one for CPUs, too


def test_a_run_names_its_optimizer() -> None:
    model = DecoderConfig.model_validate(MODEL)
    plain = short_run(model, 1).model_dump()
    for given, kind in (
        ({"lr": 0.5}, AdamWConfig),
        ({"kind": "muon", "per_head": True}, MuonConfig),
        ({"kind": "lamb"}, LAMBConfig),
        ({"kind": "sgd", "lr": 0.5}, SGDConfig),
    ):
        assert type(RunConfig.model_validate({**plain, "optimizer": given}).optimizer) is kind
    assert RunConfig.model_validate({**plain, "optimizer": {}}).optimizer == AdamWConfig()
