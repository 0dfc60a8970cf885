"""Muon on one rank: an update by hand, which parameters are matrices, and that rounds and batches change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kernels.newton_schulz import COEFFICIENTS
from kernels.newton_schulz.reference import newton_schulz_reference
from pretrain.config import ConfigError, RunConfig
from pretrain.equivalence.gate import short_run
from pretrain.optim.matrices import Matrix, describe
from pretrain.optim.muon import MuonConfig
from pretrain.train import layout
from tests.pretrain.small import MODEL, decoder


def orthogonal(x: Tensor) -> Tensor:
    return newton_schulz_reference(x.double(), COEFFICIENTS["tuned"])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scaling", ["adamw_rms", "spectral"])
def test_two_steps_by_hand(nesterov: bool, scaling: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    config = MuonConfig(lr=0.1, weight_decay=0.5, nesterov=nesterov, scaling=scaling, precision="fp32", eps=1e-12)  # type: ignore[arg-type]
    optimizer = config.build(model)
    weight, bias, momentum = model.weight.detach().double(), model.bias.detach().clone(), torch.zeros(6, 4).double()
    factor = math.sqrt(6 / 4) if scaling == "spectral" else 0.2 * math.sqrt(6)
    for _ in range(2):
        gradient = torch.randn(6, 4)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.full((6,), -3.0)
        optimizer.step()
        momentum = 0.95 * momentum + gradient.double()
        direction = gradient.double() + 0.95 * momentum if nesterov else momentum
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * factor * orthogonal(direction)
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=0, atol=1e-6)
        assert torch.equal(model.weight.grad, gradient), "gradients are not the optimizer's to change"
    torch.testing.assert_close(model.bias.detach(), bias + 0.2)  # AdamW without decay: the sign, twice
    torch.testing.assert_close(optimizer.state[model.weight]["momentum_buffer"].double(), momentum)
    assert set(optimizer.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_spectral_scaling_is_by_outputs_over_inputs() -> None:
    config = MuonConfig(scaling="spectral")
    assert config.scale(Matrix((0, 0), (8, 2), 8, 2)) == 2.0
    assert config.scale(Matrix((0, 0), (2, 8), 2, 8)) == 1.0
    assert config.scale(Matrix((0, 0, 0), (1, 2, 8), 8, 2)) == 2.0  # an expert's weight is [inputs, outputs]
    assert MuonConfig().scale(Matrix((0, 0), (8, 2), 8, 2)) == pytest.approx(0.2 * math.sqrt(8))


def test_a_separate_learning_rate_for_adamw() -> None:
    model = nn.Linear(4, 6)
    bias = model.bias.detach().clone()
    optimizer = MuonConfig(lr=0.02, adamw_lr=0.001, weight_decay=0.0, eps=1e-12).build(model)
    model.weight.grad, model.bias.grad = torch.zeros(6, 4), torch.ones(6)
    for group in optimizer.param_groups:
        group["lr"] = 0.01  # what an engine does: half of the peak
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), bias - 0.0005)


def test_which_parameters_are_matrices() -> None:
    found = describe(decoder(tie_embeddings=False))
    assert not {"embedding.weight", "head.weight", "norm.weight", "blocks.0.mixer.conv"} & set(found)
    assert {"blocks.0.mixer.qkv.weight", "blocks.0.ffn.gate_up", "blocks.0.ffn.router.weight"} <= set(found)
    # Queries and keys of 2 heads, values of 4: three matrices, or one a head.
    qkv = found["blocks.0.mixer.qkv.weight"]
    assert [(m.offsets, m.sizes) for m in qkv] == [((0, 0), (16, 32)), ((16, 0), (16, 32)), ((32, 0), (48, 32))]
    heads = describe(decoder(), per_head=True)["blocks.0.mixer.qkv.weight"]
    assert [m.sizes[0] for m in heads] == [8, 8, 8, 8, 12, 12, 12, 12]
    # Four experts, gate and up of each.
    experts = found["blocks.0.ffn.gate_up"]
    assert len(experts) == 8
    assert experts[3] == Matrix((1, 0, 16), (1, 32, 16), outputs=16, inputs=32)
    assert [m.sizes for m in found["blocks.2.ffn.stack.0.gate_up.weight"]] == [(12, 32), (12, 32)]


def test_every_matrix_of_a_stack_of_routed_parts_is_one_by_itself() -> None:
    model = decoder(
        mixers={"smha": {"kind": "smha", "heads": 4, "top_k": 2}},
        ffns={"union": {"kind": "union_of_experts", "hidden": 32, "experts": 4, "top_k": 2}},
        layers=["smha + union"],
    )
    found = describe(model)
    assert [m.sizes for m in found["blocks.0.mixer.qkv"][:3]] == [(1, 32, 8)] * 3
    assert len(found["blocks.0.mixer.qkv"]) == 12
    assert [m.offsets for m in found["blocks.0.ffn.up"][:2]] == [(0, 0, 0), (0, 0, 8)]


def test_more_parameters_for_adamw_by_pattern() -> None:
    found = describe(decoder(), apart=["*.router.*"])
    assert "blocks.0.ffn.router.weight" not in found
    assert "blocks.0.ffn.gate_up" in found
    with pytest.raises(ValueError, match="routter"):
        describe(decoder(), apart=["*.routter.*"])


def updates(config: MuonConfig, seed: int = 0) -> dict[str, Tensor]:
    model = decoder()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = config.build(model)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def test_rounds_change_nothing() -> None:
    whole = updates(MuonConfig(lr=0.1, precision="fp32"))
    for name, update in updates(MuonConfig(lr=0.1, precision="fp32", bucket_bytes=1)).items():
        torch.testing.assert_close(update, whole[name], rtol=0, atol=1e-6)


def test_every_matrix_of_a_model_is_orthogonalised() -> None:
    """Singular values of each update, over learning rate and factor, lie in the polynomials' band, in bf16 too."""
    config = MuonConfig(lr=0.1, weight_decay=0.0)
    found, described = updates(config), describe(decoder())
    for name, matrices in described.items():
        for matrix in matrices:
            block = found[name]
            for dim, (offset, size) in enumerate(zip(matrix.offsets, matrix.sizes)):
                block = block.narrow(dim, offset, size)
            values = torch.linalg.svdvals(block.reshape(matrix.sizes[-2:]).double()) / (0.1 * config.scale(matrix))
            assert values.min() > 0.6 and values.max() < 1.2, f"{name}: {values}"


def test_a_parameter_without_gradient_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MuonConfig(lr=0.1).build(model)
    before = model[0].weight.detach().clone()
    model[1].weight.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_refused_under_deepspeed_before_any_process_starts() -> None:
    from pretrain.model.decoder import DecoderConfig

    run: RunConfig = short_run(DecoderConfig.model_validate(MODEL), 2, {"kind": "deepspeed"}, optimizer="muon")
    with pytest.raises(ConfigError, match="flat partitions, in which a matrix has no shape"):
        layout.check(run, 2)
    for kind in ("lamb", "sgd"):
        run = short_run(DecoderConfig.model_validate(MODEL), 2, {"kind": "deepspeed"}, optimizer=kind)
        with pytest.raises(ConfigError, match=f"optimizer.kind={kind}"):
            layout.check(run, 2)
    layout.check(short_run(DecoderConfig.model_validate(MODEL), 2, {"kind": "deepspeed"}), 2)
