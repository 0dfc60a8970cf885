"""Sparse FFNs against transformers' blocks with the same random weights, forward and backward.

Both sides compute in fp32, in other orders: agreement to 1e-5 relative is two fp32 results of sums of some hundred terms. No
token's choice may differ; the sizes and seeds here have no near-ties.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.ffns.moe import MoE, MoEConfig
from pretrain.model.ffns.zaya_moe import ZayaMoE, ZayaMoEConfig
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry

D, F = 24, 10
SEQUENCE = SequenceContext.of(torch.zeros(2, 30, dtype=torch.int64), None)


def draw(block: nn.Module, seed: int = 0) -> None:
    """Random parameters and buffers, buffers small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for buffer in block.buffers():
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def rows(seed: int = 1) -> Tensor:
    return torch.randn(2, 30, D, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def load_experts(ours: MoE | ZayaMoE, theirs: Any) -> None:
    ours.gate_up.copy_(theirs.gate_up_proj.transpose(1, 2))
    ours.down.copy_(theirs.down_proj.transpose(1, 2))


@torch.no_grad()
def load_shared(ours: MoE, theirs: Any) -> None:
    assert ours.shared is not None
    ours.shared.gate_up.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
    ours.shared.down.weight.copy_(theirs.down_proj.weight)


def compare(ours: MoE, theirs: nn.Module) -> None:
    """Outputs, and the gradients of input, router and experts."""
    a, b = rows().requires_grad_(), rows().requires_grad_()
    y, carry = ours.train()(a, SEQUENCE, None, Carry())
    z = theirs(b)
    assert carry == Carry()
    close(y, z)
    dy = rows(seed=2)
    y.backward(dy)
    z.backward(dy)
    close(a.grad, b.grad)
    close(ours.router.weight.grad, theirs.gate.weight.grad)
    close(ours.gate_up.grad, theirs.experts.gate_up_proj.grad.transpose(1, 2))
    close(ours.down.grad, theirs.experts.down_proj.grad.transpose(1, 2))


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None and b is not None
    assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_moe(normalize: bool) -> None:
    peer = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = peer.Qwen3MoeConfig(
        hidden_size=D,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=F,
        norm_topk_prob=normalize,
        experts_implementation="eager",
    )
    theirs = peer.Qwen3MoeSparseMoeBlock(config)
    draw(theirs)
    ours = MoEConfig(experts=8, top_k=3, hidden=F, gate="softmax", normalize=normalize, bias_rate=0.0).build(D)
    ours.router.weight.data.copy_(theirs.gate.weight)
    load_experts(ours, theirs.experts)
    compare(ours, theirs)


@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_next(normalize: bool) -> None:
    peer = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = peer.Qwen3NextConfig(
        hidden_size=D,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=14,
        norm_topk_prob=normalize,
        experts_implementation="eager",
    )
    theirs = peer.Qwen3NextSparseMoeBlock(config)
    draw(theirs)
    ours = MoEConfig(
        experts=8,
        top_k=3,
        hidden=F,
        gate="softmax",
        normalize=normalize,
        bias_rate=0.0,
        shared_hidden=14,
        shared_gate=True,
    ).build(D)
    ours.router.weight.data.copy_(theirs.gate.weight)
    ours.shared_gate.weight.data.copy_(theirs.shared_expert_gate.weight)
    load_experts(ours, theirs.experts)
    load_shared(ours, theirs.shared_expert)
    compare(ours, theirs)
    close(ours.shared_gate.weight.grad, theirs.shared_expert_gate.weight.grad)


@pytest.mark.parametrize("groups, top_groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_kimi_linear(groups: int, top_groups: int, normalize: bool) -> None:
    peer = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    config = peer.KimiLinearConfig(
        hidden_size=D,
        num_local_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=F,
        n_shared_experts=2,
        routed_scaling_factor=2.446,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
        experts_implementation="eager",
    )
    theirs = peer.KimiLinearMoE(config)
    draw(theirs)
    ours = MoEConfig(
        experts=12,
        top_k=3,
        hidden=F,
        gate="sigmoid",
        normalize=normalize,
        route_scale=2.446,
        groups=groups,
        top_groups=top_groups,
        shared_hidden=2 * F,
    ).build(D)
    ours.router.weight.data.copy_(theirs.gate.weight)
    ours.router.bias.copy_(theirs.gate.e_score_correction_bias)
    load_experts(ours, theirs.experts)
    load_shared(ours, theirs.shared_experts)
    compare(ours, theirs)


@torch.no_grad()
def load_zaya(ours: ZayaMoE, theirs: Any) -> None:
    gate, router = theirs.gate, ours.router
    router.down.load_state_dict(gate.down_proj.state_dict())
    if gate.use_eda:
        router.gamma.copy_(gate.router_states_scale)
    router.norm.load_state_dict(gate.router_mlp.norm.state_dict())
    for name, peer in (("fc1", "fc1"), ("fc2", "fc2"), ("out", "out_proj")):
        getattr(router, name).load_state_dict(getattr(gate.router_mlp, peer).state_dict())
    router.bias.copy_(gate.balancing_biases)
    load_experts(ours, theirs.experts)


@pytest.mark.parametrize("skipping", [False, True])
def test_zaya_over_two_layers(skipping: bool) -> None:
    peer = pytest.importorskip("transformers.models.zaya.modeling_zaya")
    config = peer.ZayaConfig(
        hidden_size=D,
        num_experts=6,
        moe_intermediate_size=F,
        router_hidden_size=16,
        num_hidden_layers=2,
        experts_implementation="eager",
    )
    ours, theirs = [], []
    for index in range(2):
        block = peer.ZayaSparseMoeBlock(config, index)
        draw(block, seed=10 + index)
        block.gate.balancing_biases.mul_(0.2)  # of the size of the probabilities' spread: both decide
        block.gate.balancing_biases[-1] = block.gate.balancing_biases.max() if skipping else -1.0
        layer = ZayaMoEConfig(experts=6, hidden=F, router_width=16, norm_eps=config.rms_norm_eps, skip="zero").build(D)
        layer.place(index, 2)
        load_zaya(layer, block)
        ours.append(layer)
        theirs.append(block)
    a, b = rows().requires_grad_(), rows().requires_grad_()
    carry, state = Carry(), None
    x, z = a, b
    for layer, block in zip(ours, theirs):
        y, carry = layer(x, SEQUENCE, None, carry)
        w, state = block(z, state)
        close(y, w)
        close(carry.router_state, state)
        used = layer.router.load > 0
        assert used[:6].sum() > 2 and used[6] == skipping
        x, z = x + y, z + w
    dy = rows(seed=2)
    x.backward(dy)
    z.backward(dy)
    close(a.grad, b.grad)
    for layer, block in zip(ours, theirs):
        close(layer.router.down.weight.grad, block.gate.down_proj.weight.grad)
        close(layer.router.out.weight.grad, block.gate.router_mlp.out_proj.weight.grad)
        close(layer.gate_up.grad, block.experts.gate_up_proj.grad.transpose(1, 2))
    close(ours[1].router.gamma.grad, theirs[1].gate.router_states_scale.grad)
