"""ZAYA1's router and experts: counts, averaging over depth, the controller of the bias, skipping."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kernels import experts
from pretrain.model.ffns.zaya_moe import ZayaMoE, ZayaMoEConfig
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, init_normal
from pretrain.train.balance import Balance, load_entropy
from pretrain.train.callback import Run
from tests.pretrain.small import FFNS, decoder, tokens

E = 4


def zaya(index: int = 1, seed: int = 0, **fields: Any) -> ZayaMoE:
    torch.manual_seed(seed)
    ffn = ZayaMoEConfig(**{"experts": E, "hidden": 5, "router_width": 6, **fields}).build(8)
    ffn.place(index, 3)
    init_normal(ffn, 0.7)
    ffn.init_weights(0.7)
    return ffn.double()


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(ffn: ZayaMoE, x: Tensor, carry: Carry | None = None) -> tuple[Tensor, Carry]:
    return ffn(x, SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), None), None, carry or Carry())


def probability(ffn: ZayaMoE, state: Tensor) -> Tensor:
    """The router's network by hand, from its state."""
    r = ffn.router
    h = state / (state.square().mean(-1, keepdim=True) + r.norm.eps).sqrt() * r.norm.weight
    for layer in (r.fc1, r.fc2):
        h = h @ layer.weight.T + layer.bias
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return (h @ r.out.weight.T).softmax(-1)


def expert(ffn: ZayaMoE, e: int, x: Tensor) -> Tensor:
    gate, up = (x @ ffn.gate_up[e]).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ ffn.down[e]


def test_parameter_counts_of_zaya1() -> None:
    with torch.device("meta"):
        ffn = ZayaMoEConfig(experts=16, hidden=2048, router_width=256).build(2048)

    def router() -> int:
        return sum(p.numel() for p in ffn.router.parameters()) + ffn.router.bias.numel()

    assert router() == 660_752
    assert ffn.gate_up.numel() + ffn.down.numel() == 16 * 12_582_912
    assert ffn.active_parameters() == 660_752 - 16 + 12_582_912
    assert ffn.flops_per_token(0.0) == 2 * (2048 * 256 + 2 * 256**2 + 256 * 16 + 12_582_912)
    ffn.place(0, 40)
    assert router() == 660_752 - 256


def test_output_by_hand() -> None:
    ffn, x, previous = zaya(), rows(1, 9, 8), rows(1, 9, 6, seed=2)
    r = ffn.router
    torch.nn.init.normal_(r.gamma)
    for layer in (r.down, r.fc1, r.fc2):
        torch.nn.init.normal_(layer.bias)
    y, carry = apply(ffn, x, Carry(previous))
    state = x @ r.down.weight.T + r.down.bias + r.gamma * previous
    torch.testing.assert_close(carry.router_state, state)
    p = probability(ffn, state)
    for t in range(9):
        e = p[0, t].argmax().item()
        torch.testing.assert_close(y[0, t], p[0, t, e] * expert(ffn, e, x[0, t]), rtol=1e-9, atol=1e-9)


def test_state_is_the_unrolled_sum_over_depth_and_its_gradient_flows_back() -> None:
    layers, xs = [zaya(index, seed=index) for index in range(3)], [rows(1, 5, 8, seed=s) for s in range(3)]
    assert layers[0].router.gamma is None
    carry = Carry()
    for layer, x in zip(layers, xs):
        if layer.router.gamma is not None:
            torch.nn.init.normal_(layer.router.gamma)
        y, carry = apply(layer, x, carry)
    down = [x @ layer.router.down.weight.T for layer, x in zip(layers, xs)]
    first, second = layers[1].router.gamma, layers[2].router.gamma
    torch.testing.assert_close(carry.router_state, down[2] + second * down[1] + second * first * down[0])
    y.square().sum().backward()  # of the last layer's output only
    assert layers[0].router.down.weight.grad.any() and layers[1].router.gamma.grad.any()
    assert layers[0].gate_up.grad is None


def test_only_the_first_layer_of_a_decoder_has_no_gamma() -> None:
    model = decoder(ffns=FFNS, layers=["attention + zaya", "attention + swiglu", "attention + zaya x2"])
    assert [
        getattr(block.ffn, "router", None) is not None and block.ffn.router.gamma is not None for block in model.blocks
    ] == [
        False,
        False,
        True,
        True,
    ]
    model(tokens(1, 60), targets=tokens(1, 60, seed=1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_bias_chooses_but_does_not_weigh() -> None:
    ffn, x = zaya(), rows(1, 50, 8)
    r = ffn.router
    free, weights, _ = r(x, None)
    r.bias += 0.37  # the same for all: nothing changes
    again, same, _ = r(x, None)
    assert torch.equal(free, again) and torch.equal(weights, same)
    r.bias[2] += 2.0
    forced, scores, state = r(x, None)
    assert (forced == 2).all() and not (free == 2).all()
    torch.testing.assert_close(scores[:, 0], probability(ffn, state)[0, :, 2], rtol=1e-9, atol=1e-9)
    assert not r.bias.requires_grad and "bias" not in dict(r.named_parameters())


def test_the_controller_is_adamw_on_the_surplus() -> None:
    ffn = zaya(bias_lr=0.02, bias_beta1=0.8, bias_beta2=0.9, bias_weight_decay=0.1, skip="zero").float()
    bias = ffn.router.bias.clone().requires_grad_()
    assert bias.tolist() == [0.0] * E + [-1.0]
    optimizer = torch.optim.AdamW([bias], lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-8)
    for seed in range(5):
        load = torch.randint(0, 50, (E + 1,), generator=torch.Generator().manual_seed(seed))
        ffn.router.rebalance(load)
        bias.grad = load / load.sum() - 1 / (E + 1)
        optimizer.step()
        torch.testing.assert_close(ffn.router.bias, bias.detach())
    held = {name: value.clone() for name, value in ffn.router.state_dict().items()}
    assert {"bias", "bias_mean", "bias_square", "bias_steps"} <= set(held) and "load" not in held
    ffn.router.load += 3
    ffn.router.rebalance(torch.zeros(E + 1, dtype=torch.int64))  # a skipped step
    assert all(torch.equal(value, held[name]) for name, value in ffn.router.state_dict().items())
    assert not ffn.router.load.any()


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ({}, [0.25] * 4),
        ({"skip": "zero"}, [0.2] * 5),
        ({"skip": "identity", "skip_target": 0.4}, [0.15] * 4 + [0.4]),
    ],
)
def test_the_controller_evens_a_skewed_router(fields: dict[str, Any], target: list[float]) -> None:
    ffn, x = zaya(seed=3, bias_lr=0.01, **fields).float(), rows(1, 600, 8).float() + 1.0
    r = ffn.router
    r(x, None)
    start = load_entropy(r.load[:E])
    for _ in range(400):
        r.load.zero_()
        r(x, None)
        last = r.load.clone()
        r.rebalance(last)
    assert load_entropy(last[:E]) > 0.99 > 0.9 > start
    torch.testing.assert_close(last / last.sum(), torch.tensor(target), rtol=0, atol=0.03)


@pytest.mark.parametrize("skip", ["zero", "identity"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_skipping_by_hand(skip: Any, top_k: int) -> None:
    ffn, x = zaya(skip=skip, top_k=top_k), rows(1, 60, 8)
    apply(ffn.train(), x)
    assert ffn.router.load[E] == 0 and ffn.router.load.sum() == 60 * top_k  # at first nobody skips
    ffn.router.bias[E] = 0.0
    y, carry = apply(ffn, x)
    p = probability(ffn, carry.router_state)[0]
    skipped = 0
    for t in range(60):
        expected = torch.zeros(8, dtype=torch.float64)
        for c in p[t].topk(top_k).indices.tolist():
            skipped += c == E
            if c < E:
                expected = expected + p[t, c] * expert(ffn, c, x[0, t])
            elif skip == "identity":
                expected = expected + p[t, c] * x[0, t]
        torch.testing.assert_close(y[0, t], expected, rtol=1e-9, atol=1e-9)
    assert 5 < skipped < 55
    assert ffn.router.load[E] == skipped


def test_only_tokens_that_need_an_expert_travel_and_only_to_their_own() -> None:
    for top_k in (1, 2):
        ffn, x, seen = zaya(skip="zero", top_k=top_k), rows(1, 60, 8), []
        ffn.router.bias[E] = 0.0
        chosen, _, _ = ffn.router(x, None)

        def spy(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor, seen: Any = seen) -> Tensor:
            seen.append(indices)
            return experts(x, gate_up, down, indices, scores)

        ffn.dispatch = spy
        apply(ffn, x)
        needed = chosen[(chosen < E).any(-1)]
        (sent,) = seen
        assert sent.shape == needed.shape and (len(sent) < 60) == (top_k == 1)
        assert (sent[:, :, None] == needed[:, None, :]).any(-1).all()


def test_when_all_skip_nothing_is_computed_and_gradients_are_zero() -> None:
    ffn, x = zaya(skip="zero"), rows(2, 7, 8).requires_grad_()
    ffn.router.bias[E] = 2.0
    y, _ = apply(ffn, x)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert not ffn.gate_up.grad.any() and not ffn.router.out.weight.grad.any()
    identity = zaya(skip="identity")
    identity.router.bias[E] = 2.0
    y, carry = apply(identity, x)
    torch.testing.assert_close(y, probability(identity, carry.router_state)[..., E:] * x, rtol=1e-9, atol=1e-9)


def test_equal_probabilities_go_to_the_first_expert() -> None:
    ffn = zaya()
    torch.nn.init.zeros_(ffn.router.out.weight)
    indices, scores, _ = ffn.router(rows(1, 30, 8), None)
    assert not indices.any() and torch.equal(scores, torch.full_like(scores, 0.25))


def test_balance_reports_experts_and_skipped_tokens_apart() -> None:
    model = decoder(ffns=FFNS, layers=["attention + zaya_skip", "attention + moe"])
    names = list(model.routers())
    model.routers()[names[0]].load.copy_(torch.tensor([5, 5, 5, 5, 80]))
    model.routers()[names[1]].load.copy_(torch.tensor([10, 10, 0, 0]))
    run = SimpleNamespace(model=model, processes=SimpleNamespace(sum_=lambda load: load), record={"grad_norm": 1.0})
    Balance().on_step(cast(Run, run))
    assert run.record["load_entropy"] == {names[0]: 1.0, names[1]: 0.5}
    assert run.record["skip_share"] == {names[0]: 0.8}
    bias = model.routers()[names[0]].bias
    assert bias[4] < -1.0 < 0.0 < bias[0]  # too many skipped


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "top_k=5 is more than experts=4; choose at most 4"),
        ({"skip_target": 0.1}, "skip_target=0.1 needs a skip choice; set skip to zero or identity"),
        ({"skip": "half"}, "skip"),
        ({"bias_beta1": 1.0}, "bias_beta1"),
    ],
)
def test_mistakes_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zaya(**fields)


def test_router_widths_must_agree_over_depth() -> None:
    with pytest.raises(ValueError, match="router_width=6, but the routing layer before has 7"):
        apply(zaya(), rows(1, 5, 8), Carry(rows(1, 5, 7)))
