"""The feed-forward union: the dense block when all experts are selected, and causal in every form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.ffns.union_of_experts import UnionOfExperts, UnionOfExpertsConfig
from pretrain.model.quantiles import BINS, SPAN, Quantiles
from pretrain.model.sublayer import Carry
from pretrain.model.union import first_come, prefix_mean
from pretrain.model.union_conversion import (
    convert_dense_to_union,
    convert_union_to_dense,
    dense_config,
    join_biases,
    join_columns,
    join_rows,
    split_biases,
    split_columns,
    split_rows,
    split_sections,
)
from tests.pretrain.model.union_probes import FORMS, context, drawn, fixed, leak, released, run
from tests.pretrain.small import MODEL, decoder, tokens

FULL: dict[str, dict[str, Any]] = {
    "all": {"select": "all"},
    "token choice": {"top_k": 4},
    "threshold": {"select": "threshold", "mean_load": 1.0},
    "prefix": {"select": "all", "expert_select": "prefix", "kept": 4, "expert_patch": 3},
    "both, capacity": {"top_k": 4, "patch": 2, "expert_select": "prefix", "kept": 4, "capacity": 99},
    "token choice, no router gradient": {"top_k": 4, "router_gradient": "none"},
    "threshold, no router gradient": {"select": "threshold", "mean_load": 1.0, "router_gradient": "none"},
}


def union(width: int = 8, **options: Any) -> UnionOfExperts:
    base = {"hidden": 16, "experts": 4}
    return drawn(UnionOfExpertsConfig(**{**base, **options}).build(width))


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(x: torch.Tensor, weights: dict[str, torch.Tensor], activation: str) -> torch.Tensor:
    """The block that the union was cut from; weights as nn.Linear has them."""
    hidden = F.linear(x, weights["w1"], weights.get("b1"))
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = getattr(F, activation)(hidden)
    return F.linear(hidden, weights["w2"], weights.get("b2"))


# ------------------------------------------------------------------------------------------------ the dense block, cut


@pytest.mark.parametrize("routing", FULL)
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True), ("relu", False)])
def test_all_experts_are_the_dense_block_forward_and_backward(routing: str, activation: str, bias: bool) -> None:
    ffn = union(activation=activation, bias=bias, **FULL[routing])
    gated = activation == "swiglu"
    weights = {"w1": inputs(32 if gated else 16, 8, seed=2), "w2": inputs(8, 16, seed=3)}
    if bias:
        weights |= {"b1": inputs(len(weights["w1"]), seed=4), "b2": inputs(8, seed=5)}
    sections = [16, 16] if gated else [16]
    with torch.no_grad():
        ffn.up.copy_(split_sections(weights["w1"], sections, 4))
        ffn.down.copy_(split_columns(weights["w2"], 4))
        if bias:
            pieces = [split_biases(part, weights["b2"], 4) for part in weights["b1"].split(sections)]
            ffn.up_bias.copy_(torch.cat([piece[0] for piece in pieces], dim=-1))
            ffn.down_bias.copy_(pieces[0][1])
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    x, again = inputs(2, 11, 8).requires_grad_(), inputs(2, 11, 8).requires_grad_()
    expected, actual = dense(x, weights, activation), run(ffn, again)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = inputs(2, 11, 8, seed=6)
    expected.backward(upstream)
    actual.backward(upstream)
    close = {"rtol": 1e-11, "atol": 1e-11}
    # The routers' own gradient flows on into the input; without it, that too is the dense one.
    routed = bool(list(ffn.routing.parameters())) and ffn.routing.gradient != "none"
    assert ((again.grad - x.grad).abs().max() > 0.1) if routed else torch.allclose(again.grad, x.grad, **close)
    torch.testing.assert_close(ffn.up.grad, split_sections(weights["w1"].grad, sections, 4), **close)
    torch.testing.assert_close(ffn.down.grad, split_columns(weights["w2"].grad, 4), **close)
    if bias:
        torch.testing.assert_close(ffn.down_bias.grad, weights["b2"].grad.expand(4, -1), **close)


def test_output_bias_is_divided_not_copied() -> None:
    ffn = union(activation="gelu", bias=True, select="all")
    b2 = inputs(8, seed=5)
    with torch.no_grad():
        ffn.down_bias.copy_(split_biases(torch.zeros(16).double(), b2, 4)[1])
        right = run(ffn, inputs(1, 3, 8))
        ffn.down_bias.copy_(b2.expand(4, -1))
        copied = run(ffn, inputs(1, 3, 8))
    torch.testing.assert_close(copied - right, (3 * b2).expand(1, 3, -1))


def test_shards_go_back_to_the_same_bits() -> None:
    w1, w2, b1, b2 = inputs(12, 5), inputs(5, 12), inputs(12), inputs(5)
    assert torch.equal(split_rows(w1, 4)[1], w1[3:6].T) and torch.equal(split_columns(w2, 4)[1], w2[:, 3:6].T)
    assert torch.equal(join_rows(split_rows(w1, 4)), w1) and torch.equal(join_columns(split_columns(w2, 4)), w2)
    first, second = join_biases(*split_biases(b1, b2, 4))
    assert torch.equal(first, b1) and torch.equal(second, b2)


def test_output_adds_up_over_disjoint_sets_and_order_changes_nothing() -> None:
    ffn, x = union(select="all"), inputs(2, 9, 8)
    first = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    outputs = []
    for mask in (first, ~first, torch.ones_like(first)):
        ffn.routing.forward = fixed(mask)
        outputs.append(run(ffn, x))
    torch.testing.assert_close(outputs[0] + outputs[1], outputs[2], rtol=1e-12, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    ffn.routing.forward = fixed(first[..., order])
    with torch.no_grad():
        ffn.up.copy_(ffn.up[order].clone())
        ffn.down.copy_(ffn.down[order].clone())
    torch.testing.assert_close(run(ffn, x), outputs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_every_path_is_the_sum_over_selected_experts(activation: str) -> None:
    ffn, x = union(activation=activation, top_k=2, router_gradient="mean_one"), inputs(2, 9, 8)
    selection = ffn.routing(x, context(2, 9))
    expected = torch.zeros_like(x)
    for i in range(4):
        one = dense(x, {"w1": ffn.up[i].T, "w2": ffn.down[i].T}, activation)
        expected += torch.where(selection.mask[..., i, None], selection.factor[..., i, None] * one, 0.0)
    ragged = selection._replace(indices=None)
    flat = x.flatten(0, 1)
    paths = [ffn._plain(flat, selection), ffn._through_kernel(flat, selection), ffn._through_kernel(flat, ragged)]
    for path in paths:
        torch.testing.assert_close(path.view_as(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_token_that_nobody_takes_gets_exactly_zero(activation: str) -> None:
    ffn, x = union(activation=activation, bias=activation == "relu", select="all"), inputs(1, 6, 8)
    mask = torch.ones(1, 6, 4, dtype=torch.bool)
    mask[0, [0, 3]] = False
    ffn.routing.forward = fixed(mask)
    y = run(ffn, x)
    assert y[0, [0, 3]].abs().max() == 0 and y[0, [1, 2, 4, 5]].abs().amax(-1).min() > 1e-3
    ffn.routing.forward = fixed(torch.zeros_like(mask))
    empty = run(ffn, x)
    empty.sum().backward()
    assert empty.abs().max() == 0 and ffn.up.grad.abs().max() == 0


# ------------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("form", FORMS)
def test_no_output_depends_on_later_tokens(form: str) -> None:
    ffn, x = union(**FORMS[form]), inputs(3, 24, 8)
    for t in (1, 5, 8, 13, 23):
        assert leak(lambda rows: run(ffn, rows), x, t) == 0


@pytest.mark.parametrize(("fill", "top_k"), [(True, 2), (False, 4), (False, 2)])
def test_the_same_probe_finds_the_leak_of_the_released_rule(fill: bool, top_k: int) -> None:
    ffn, x = union(select="all"), inputs(3, 24, 8)
    ffn.routing.forward = released(inputs(4, 8, seed=7), top_k, fill)
    assert leak(lambda rows: run(ffn, rows), x, 13) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_alone_in_a_batch_and_packed(form: str) -> None:
    ffn, x = union(**FORMS[form]), inputs(3, 12, 8)
    together = run(ffn, x)
    for row in range(3):
        torch.testing.assert_close(run(ffn, x[row : row + 1])[0], together[row], rtol=1e-12, atol=1e-12)
    borders = [0, 1, 8, 8, 19, 21, 36]
    packed = x.reshape(1, 36, 8)
    y = run(ffn, packed, context(1, 36, borders))
    alone = [run(ffn, packed[:, a:b]) for a, b in pairwise(borders) if a < b]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
    changed = packed.clone()
    changed[:, 8:19] += 1.0
    difference = (run(ffn, changed, context(1, 36, borders)) - y).abs().amax(-1)[0]
    assert difference[:8].max() == 0 and difference[19:].max() == 0 and difference[8:19].max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_pieces_with_a_cache_equal_one_pass(form: str) -> None:
    ffn, x = union(**FORMS[form]), inputs(3, 24, 8)
    cache: dict[str, Any] = {}
    parts, seen = [], 0
    for piece in x.split([5, 1, 1, 9, 1, 7], dim=1):
        parts.append(run(ffn, piece, context(3, piece.shape[1], offset=seen), cache))
        seen += piece.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), run(ffn, x), rtol=1e-11, atol=1e-11)


def test_prefix_mean_by_hand() -> None:
    values = torch.tensor([3.0, 5.0, 1.0, 7.0, 4.0, 10.0, 2.0])[None, :, None]
    whole = prefix_mean(values, 1, context(1, 7), None, "")
    torch.testing.assert_close(whole[0, :, 0], torch.tensor([3.0, 4.0, 3.0, 4.0, 4.0, 5.0, 32 / 7]))
    patches = prefix_mean(values, 3, context(1, 7), None, "")
    torch.testing.assert_close(patches[0, :, 0], torch.tensor([3.0, 3.0, 3.0, 4.0, 4.0, 4.0, 32 / 7]))
    packed = prefix_mean(values, 2, context(1, 7, [0, 4, 7]), None, "")
    torch.testing.assert_close(packed[0, :, 0], torch.tensor([3.0, 3.0, 3.0, 3.0, 4.0, 4.0, 16 / 3]))


def test_patch_shares_its_experts() -> None:
    selection = union(top_k=2, patch=4).routing(inputs(2, 12, 8), context(2, 12))
    patches = selection.mask.view(2, 3, 4, 4)
    assert (patches == patches[:, :, :1]).all() and not (patches[:, 0] == patches[:, 1]).all()


def test_capacity_takes_the_first_and_honours_borders_and_caches() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1]], dtype=torch.bool)[..., None]
    kept = lambda *arguments: first_come(*arguments)[0, :, 0].int().tolist()  # noqa: E731
    assert kept(mask, 2, context(1, 7), None) == [1, 0, 1, 0, 0, 0, 0]
    assert kept(mask, 2, context(1, 7, [0, 3, 7]), None) == [1, 0, 1, 1, 1, 0, 0]
    cache: dict[str, Any] = {}
    pieces = [kept(piece, 3, context(1, 1), cache)[0] for piece in mask.split(1, dim=1)]
    assert pieces == [1, 0, 1, 1, 0, 0, 0]


def test_hierarchy_chooses_among_the_kept_experts() -> None:
    ffn, x = union(top_k=1, expert_select="prefix", kept=2, expert_patch=4), inputs(2, 16, 8)
    outer, inner = ffn.routing(x, context(2, 16)).levels
    assert (outer.mask.sum(-1) == 2).all() and (inner.mask.sum(-1) == 1).all()
    assert (inner.mask <= outer.mask).all()
    free = ffn.routing.data_router.choose(inner.log_gate, None)[0]
    assert (free & ~outer.mask).any()  # without the outer level, some would have gone elsewhere


# ------------------------------------------------------------------------------------------------------------- learning


def test_router_learns_through_a_factor_of_one() -> None:
    ffn, x = union(top_k=2), inputs(1, 7, 8)
    selection = ffn.routing(x, context(1, 7))
    assert torch.equal(selection.factor, torch.ones_like(selection.factor))
    upstream = inputs(1, 7, 8, seed=3)
    run(ffn, x).backward(upstream)
    # d loss / d log g_i = <upstream, E_i(x)> over the selected experts.
    weight = ffn.routing.data_router.weight
    outputs = torch.stack([dense(x, {"w1": ffn.up[i].T, "w2": ffn.down[i].T}, "swiglu") for i in range(4)], dim=-2)
    slope = (outputs * upstream[..., None, :]).sum(-1) * selection.mask
    log_gate = F.linear(x, weight).log_softmax(-1)
    (expected,) = torch.autograd.grad((log_gate * slope.detach()).sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-11, atol=1e-11)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("form", [form for form in FORMS if form != "mean-one gates"])
def test_every_router_gets_a_gradient_unless_it_is_switched_off(form: str) -> None:
    for gradient in ("straight_through", "none"):
        ffn = union(**{**FORMS[form], "router_gradient": gradient})
        run(ffn, inputs(2, 16, 8)).square().sum().backward()
        for weight in ffn.routing.parameters():
            assert (weight.grad is None) if gradient == "none" else (weight.grad.abs().max() > 1e-3)


def test_mean_one_gates() -> None:
    ffn, x = union(top_k=2, router_gradient="mean_one"), inputs(2, 7, 8)
    selection = ffn.routing(x, context(2, 7))
    torch.testing.assert_close(selection.factor.sum(-1), torch.full((2, 7), 2.0).double())
    scores = F.linear(x, ffn.routing.data_router.weight).softmax(-1) * selection.mask
    torch.testing.assert_close(selection.factor, 2 * scores / scores.sum(-1, keepdim=True))
    with torch.no_grad():
        ffn.routing.data_router.weight.zero_()  # uniform gates: the plain sum
    assert torch.equal(ffn.routing(x, context(2, 7)).factor.sum(-1), torch.full((2, 7), 2.0).double())


def test_quantile_of_a_step_by_hand() -> None:
    quantiles = Quantiles(2, 0.25, 0.5)
    odds = torch.stack([torch.arange(400) / 100 - 2, torch.arange(400) / 400], dim=-1).view(4, 100, 2)
    assert quantiles.train()(odds).all()  # before the first step everything is selected
    quantiles.rebalance(quantiles.load.clone())
    torch.testing.assert_close(quantiles.threshold, torch.tensor([1.0, 0.75]), atol=0.01, rtol=0)  # taken whole
    assert quantiles.load.sum() == 0
    shares = quantiles.eval()(odds).float().mean((0, 1))
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25]), atol=0.01, rtol=0)
    quantiles.train()(odds + 1.0)
    quantiles.rebalance(quantiles.load.clone())
    torch.testing.assert_close(quantiles.threshold, torch.tensor([1.5, 1.25]), atol=0.02, rtol=0)  # half of the way
    before = quantiles.threshold.clone()
    quantiles.rebalance(torch.zeros(2 * BINS, dtype=torch.int64))  # a skipped step
    assert torch.equal(quantiles.threshold, before)


def test_quantile_counts_add_up_over_micro_batches_and_survive_nan() -> None:
    parts, whole = Quantiles(3, 0.3, 0.1).train(), Quantiles(3, 0.3, 0.1).train()
    odds = torch.randn(4, 50, 3) * 5
    odds[0, 0, 0] = torch.nan
    for row in odds:
        parts(row[None])
    whole(odds)
    assert torch.equal(parts.load, whole.load) and whole.load.sum() == 600
    everything = Quantiles(3, 1.0, 0.1).train()
    everything(odds)
    everything.rebalance(everything.load.clone())
    assert (everything.threshold == -SPAN).all()


def test_threshold_is_frozen_within_a_step() -> None:
    ffn = union(select="threshold", mean_load=0.5).train()
    quantiles = ffn.routing.data_router.quantiles
    before, x = quantiles.threshold.clone(), inputs(2, 40, 8)
    first, second = run(ffn, x), run(ffn, x * 1.0)
    assert torch.equal(quantiles.threshold, before) and torch.equal(first, second) and quantiles.load.sum() == 640


@pytest.mark.parametrize(
    ("options", "target"),
    [({"mean_load": 0.25}, 0.25), ({"mean_load": 0.3, "expert_select": "prefix", "kept": 3}, 0.3)],
)
def test_training_moves_the_router_and_holds_the_load(options: dict[str, Any], target: float) -> None:
    ffn = drawn(UnionOfExpertsConfig(hidden=32, experts=4, select="threshold", **options).build(8), std=0.3).train()
    teacher = inputs(8, 8, seed=8)
    optimizer = torch.optim.Adam(ffn.parameters(), lr=0.02)
    started = ffn.routing.data_router.weight.detach().clone()
    losses = []
    for step in range(80):
        x = inputs(8, 32, 8, seed=100 + step)
        loss = (run(ffn, x) - (x @ teacher).relu()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for module in ffn.modules():
            if hasattr(module, "rebalance"):
                module.rebalance(module.load.clone())
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert (ffn.routing.data_router.weight - started).abs().max() > 0.1
    mask = ffn.eval().routing(inputs(32, 64, 8, seed=99), context(32, 64)).mask
    torch.testing.assert_close(mask.double().mean((0, 1)), torch.full((4,), target).double(), atol=0.05, rtol=0)


def test_bias_evens_the_load_of_top_k_choices() -> None:
    ffn = union(top_k=1, bias_rate=0.02).train()
    x = inputs(4, 100, 8) + 1.0  # a common direction: some experts start with nearly everything
    router = ffn.routing.data_router
    loads = []
    for _ in range(100):
        run(ffn, x)
        loads.append(router.load.clone())
        router.rebalance(router.load.clone())
    assert loads[0].max() > 150 and loads[-1].max() < 125 and loads[-1].sum() == 400


def test_balance_loss_by_hand_and_only_in_training() -> None:
    ffn, x = union(top_k=2, balance_loss=0.1), inputs(2, 10, 8)
    selection = ffn.routing(x, context(2, 10))
    share = selection.mask.double().mean((0, 1)) / 2
    probability = F.linear(x, ffn.routing.data_router.weight).softmax(-1).mean((0, 1))
    expected = 0.1 * 20 * 4 * (share * probability).sum()
    assert ffn(x, context(2, 10), None, Carry())[1].auxiliary is None
    auxiliary = ffn.train()(x, context(2, 10), None, Carry(auxiliary=torch.tensor(1.0).double()))[1].auxiliary
    torch.testing.assert_close(auxiliary, expected + 1.0)
    (gradient,) = torch.autograd.grad(auxiliary, ffn.routing.data_router.weight)
    assert gradient.abs().max() > 1e-3
    with torch.no_grad():
        ffn.routing.data_router.weight.zero_()
    torch.testing.assert_close(ffn.routing(x, context(2, 10)).imbalance(), torch.tensor(1.0).double())


# --------------------------------------------------------------------------------------------------- counts and configs


def test_parameter_counts() -> None:
    count = lambda **options: sum(p.numel() for p in union(**options).parameters())  # noqa: E731
    assert count(select="all") == 3 * 8 * 16
    assert count(top_k=2) == 3 * 8 * 16 + 4 * 8
    assert count(top_k=1, expert_select="prefix", kept=2) == 3 * 8 * 16 + 2 * 4 * 8
    plain = (16 * 8 + 16) + (8 * 16 + 8)
    assert count(activation="gelu", bias=True, top_k=2) == plain + 4 * 8 + (4 - 1) * 8
    assert union(top_k=1).active_parameters() == 3 * 8 * 16 // 4 + 4 * 8
    assert union(select="threshold", mean_load=0.5).active_parameters() == 3 * 8 * 16 // 2 + 4 * 8


@pytest.mark.parametrize(("options", "share"), [({"top_k": 1}, 0.25), ({"top_k": 3}, 0.75), ({"select": "all"}, 1.0)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_are_the_selected_share_of_the_dense_block(options: dict, share: float, activation: str) -> None:
    ffn, x = union(activation=activation, **options), inputs(2, 10, 8)
    router = 0 if share == 1.0 else 2 * 4 * 8
    matrices = 3 if activation == "swiglu" else 2
    assert ffn.flops_per_token(100.0) == share * 2 * matrices * 8 * 16 + router
    with FlopCounterMode(display=False) as counter:
        run(ffn, x)
    assert counter.get_total_flops() == 20 * ffn.flops_per_token(100.0)


def test_flops_follow_expected_load_and_capacity() -> None:
    dense_flops = 2 * 3 * 8 * 16
    assert union(select="threshold", mean_load=0.3).flops_per_token(9.0) == pytest.approx(0.3 * dense_flops + 64)
    limited = union(top_k=2, capacity=10)
    assert limited.flops_per_token(50.5) == pytest.approx(0.1 * dense_flops + 64)  # 10 of 100 tokens
    assert limited.flops_per_token(5.0) == pytest.approx(0.5 * dense_flops + 64)  # 9 tokens: no limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5 is more than the 4 experts to choose from"),
        ({"top_k": 3, "expert_select": "prefix", "kept": 2}, "top_k=3 is more than the 2 experts"),
        ({}, "select=token_choice needs top_k"),
        ({"select": "threshold"}, "select=threshold needs mean_load"),
        ({"select": "threshold", "mean_load": 0.5, "top_k": 2}, "top_k=2 with select=threshold"),
        ({"top_k": 2, "mean_load": 0.5}, "mean_load=0.5 with select=token_choice"),
        ({"top_k": 2, "kept": 2}, "kept=2 with expert_select=none"),
        ({"top_k": 2, "expert_select": "prefix"}, "prefix needs kept"),
        ({"top_k": 2, "expert_select": "prefix", "kept": 5}, "kept=5 is more than experts=4"),
        ({"top_k": 2, "expert_patch": 4}, "expert_patch=4 needs expert_select=prefix"),
        ({"select": "all", "patch": 4}, "patch=4 with select=all"),
        ({"top_k": 2, "hidden": 18}, "experts=4 does not divide hidden=18; choose one of 1, 2, 3, 6, 9, 18"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnionOfExpertsConfig(**{"hidden": 16, "experts": 4, **options}).build(8)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("form", ["token choice", "experts, then threshold, capacity"])
def test_bf16_autocast_is_near_and_finite(form: str, activation: str) -> None:
    ffn, x = union(activation=activation, **FORMS[form]).float(), inputs(2, 20, 8).float()
    wide = run(ffn, x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = run(ffn, x)
    assert narrow.dtype == torch.bfloat16
    narrow.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in ffn.parameters())
    assert (narrow - wide).norm() < 0.02 * wide.norm()


# --------------------------------------------------------------------------------------------------------- whole models


def union_model(**changes: Any) -> dict[str, Any]:
    full = {"select": "threshold", "mean_load": 1.0, "router_gradient": "none"}
    mixers = {**MODEL["mixers"], "smha": {"kind": "smha", "heads": 4, "kv_heads": 2, **full}}
    ffns = {
        **MODEL["ffns"],
        "union": {"kind": "union_of_experts", "hidden": 48, "experts": 4, **full},
        "half": {
            "kind": "union_of_experts",
            "hidden": 48,
            "experts": 4,
            "top_k": 2,
            "expert_select": "prefix",
            "kept": 3,
        },
    }
    ffns |= {"plain": {**ffns["union"], "activation": "gelu", "bias": True}}
    layers = ["gdn + union", "smha + moe", "plain", "smha + union"]
    return {**MODEL, "init_std": 0.2, "mixers": mixers, "ffns": ffns, "layers": layers, **changes}


@pytest.mark.parametrize("extra", [None, {"layer": "smha + union"}])
def test_dense_checkpoint_becomes_a_union_and_back_to_the_same_bits(extra: dict | None) -> None:
    config = DecoderConfig.model_validate(union_model(multi_token=extra))
    torch.manual_seed(3)
    plain = Decoder(dense_config(config)).double()
    torch.nn.init.normal_(plain.blocks[2].ffn.up.bias)
    torch.nn.init.normal_(plain.blocks[2].ffn.down.bias)
    state = plain.state_dict()
    converted = convert_dense_to_union(state, config)
    model = Decoder(config).double()
    assert {name: tensor.dtype for name, tensor in converted.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(converted)
    back = convert_union_to_dense(converted, config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    row, targets = tokens(2, 17), tokens(2, 17, seed=1)
    torch.testing.assert_close(model(row), plain(row), rtol=1e-6, atol=1e-6)  # logits are fp32
    model(row, targets=targets).backward()
    plain(row, targets=targets).backward()
    block, original = model.blocks[3], plain.blocks[3]
    gradient = split_columns(original.ffn.down.weight.grad, 4)
    torch.testing.assert_close(block.ffn.down.grad, gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        block.mixer.qkv.grad, split_sections(original.mixer.qkv.weight.grad, [32, 16, 16], 2), rtol=1e-5, atol=1e-6
    )


def test_union_checkpoint_goes_to_dense_and_back() -> None:
    config = DecoderConfig.model_validate(union_model(layers=["smha + half"]))
    torch.manual_seed(3)
    state = Decoder(config).state_dict()
    again = convert_dense_to_union(convert_union_to_dense(state, config), config, seed=5)
    assert again.keys() == state.keys()
    same = {name for name in state if torch.equal(again[name], state[name])}
    drawn_anew = {name for name in state if name.endswith("router.weight")}
    assert same == state.keys() - drawn_anew and len(drawn_anew) == 3
    for seed in (5, 6):
        torch.manual_seed(seed)  # the global state decides nothing
        other = convert_dense_to_union(convert_union_to_dense(state, config), config, seed=seed)
        assert {name for name in state if not torch.equal(again[name], other[name])} == (
            drawn_anew if seed == 6 else set()
        )
    assert again["blocks.0.ffn.routing.data_router.weight"].std().item() == pytest.approx(0.2, rel=0.2)


def test_conversion_names_what_does_not_fit() -> None:
    config = DecoderConfig.model_validate(union_model())
    state = Decoder(dense_config(config)).state_dict()
    for change, message in [
        (lambda s: s.pop("blocks.0.ffn.down.weight"), "blocks.0.ffn.down.weight is missing"),
        (lambda s: s.update({"blocks.1.mixer.gate.weight": torch.zeros(1)}), "gate.weight has no place"),
        (lambda s: s.update({"blocks.3.ffn.gate_up.weight": torch.zeros(8, 32)}), r"is \(8, 32\), but the config has"),
    ]:
        broken = dict(state)
        change(broken)
        with pytest.raises(ValueError, match=message):
            convert_dense_to_union(broken, config)
    biased = {"kind": "union_of_experts", "hidden": 48, "experts": 4, "top_k": 2, "bias": True}
    with pytest.raises(ValueError, match="bias=True with activation=swiglu has no dense feed-forward"):
        dense_config(DecoderConfig.model_validate(union_model(ffns={"union": biased}, layers=["gdn + union"])))


def test_decoder_decodes_packs_and_counts() -> None:
    model = decoder(**union_model(layers=["smha + half"], repeat=2)).double().eval()
    row = tokens(2, 30)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in row.split([7, 1, 5, 1, 1, 15], dim=1)]
    assert (torch.cat(parts, dim=1) - model(row)).abs().max() < 1e-5
    packed = model(row.view(1, 60), cu_seqlens=torch.tensor([0, 30, 60], dtype=torch.int32))
    assert (packed.view(2, 30, -1) - model(row)).abs().max() < 1e-5
    total = sum(p.numel() for p in model.parameters())
    assert model.active_parameters() == total - 2 * (3 * 32 * 48) // 2
    assert set(model.routers()) >= {"blocks.0.ffn.routing.expert_router", "blocks.1.mixer.routing.data_router"}
