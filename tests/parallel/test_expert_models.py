"""Sparse models under expert parallelism against one rank: losses, gradients, two balanced steps, and the order of events."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from parallel.expert import check_experts
from pretrain.model.decoder import Decoder
from tests.parallel import expert_models
from tests.parallel.expert_models import SPARSE, Trained, config, through_zaya, trained, two_zaya_layers
from tests.ranks import TRAINING, run_ranks


@cache
def alone(ffn: str) -> Trained:
    return trained(0, 1, ffn, {})


def run(ffn: str, world: int, sizes: dict[str, Any], *more: Any) -> list[Trained]:
    return run_ranks(expert_models.trained, world, ffn, sizes, 2, *more, preload=TRAINING)


def assert_same(results: list[Trained], ffn: str) -> None:
    """Every rank ends where one rank alone does."""
    one = alone(ffn)
    for result in results:
        for kind in ("gradients", "parameters", "biases"):
            ours, theirs = getattr(result, kind), getattr(one, kind)
            assert ours.keys() == theirs.keys()
            for name, wanted in theirs.items():
                assert_close(ours[name], wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        assert result.losses == pytest.approx(one.losses, rel=1e-10)
        assert result.records == one.records


def test_one_rank_has_something_to_compare() -> None:
    for ffn in SPARSE:
        one = alone(ffn)
        routers = [name for name in one.biases if name.endswith((".bias", ".threshold"))]
        assert routers and all(one.biases[name].any() for name in routers)
        assert all(gradient.any() for gradient in one.gradients.values())
        assert all(not load.any() for name, load in one.biases.items() if name.endswith(".load"))
    assert all(0 < share < 0.8 for share in alone("zaya").records[0]["skip_share"].values())


@pytest.mark.parametrize(
    ("ffn", "world", "sizes"),
    [
        ("top1", 2, {"ep": 2}),
        ("top2", 2, {"ep": 2}),
        ("top3", 4, {"ep": 4}),
        ("zaya", 4, {"ep": 4}),
        ("zaya2", 2, {"ep": 2}),
        ("union", 2, {"ep": 2}),
        ("union_threshold", 4, {"ep": 4}),
        ("top2", 4, {"ep": 2}),  # edp = 2
        ("zaya", 4, {"ep": 2}),
        ("top3", 2, {"ep": 1}),  # loads only
        ("top2", 2, {"tp": 2, "ep": 2}),  # ranks hold slices of the same rows
        ("zaya2", 2, {"tp": 2, "ep": 2}),
        ("top2", 4, {"tp": 2, "ep": 4}),
        ("top2", 2, {"tp": 2, "expert_tensor": True}),
        ("top3", 4, {"tp": 2, "ep": 2, "expert_tensor": True}),
        ("zaya2", 4, {"tp": 2, "ep": 2, "expert_tensor": True}),
        ("union", 2, {"tp": 2}),
        ("top2", 2, {"cp": 2, "ep": 2}),
        ("union", 2, {"cp": 2, "ep": 2}),
        ("zaya2", 4, {"cp": 2, "tp": 2, "ep": 4}),
    ],
)
def test_two_steps_are_those_of_one_rank(ffn: str, world: int, sizes: dict[str, Any]) -> None:
    assert_same(run(ffn, world, sizes), ffn)


def test_recomputing_activations_changes_nothing() -> None:
    assert_same(run("top2", 2, {"ep": 2}, True), "top2")


@pytest.mark.parametrize(
    ("ffn", "world", "sizes"),
    [
        ("top2", 2, {"ep": 2}),
        *(
            pytest.param(*each, marks=pytest.mark.campaign)
            for each in (
                ("zaya2", 2, {"ep": 2}),
                ("union", 2, {"ep": 2}),
                ("top2", 2, {"tp": 2, "ep": 2}),
                ("top2", 2, {"cp": 2, "ep": 2}),
            )
        ),
    ],
)
def test_compiled_blocks_take_the_same_steps(ffn: str, world: int, sizes: dict[str, Any]) -> None:
    assert_same(run(ffn, world, sizes, True, "", True), ffn)


@pytest.mark.parametrize("fault", ["scaled", "local loads", "local biases"])
def test_faults_are_seen(fault: str) -> None:
    """Gradients of experts times ep; balancing losses, and balancing itself, by the loads of one rank."""
    with pytest.raises(AssertionError):
        assert_same(run("top3", 2, {"ep": 2}, False, fault), "top3")


@pytest.mark.parametrize("ffn", ["top2", "zaya2"])
def test_bf16_is_finite(ffn: str) -> None:
    for result in run_ranks(expert_models.in_bf16, 2, ffn, preload=TRAINING):
        assert len(result) > 10 and all(value.isfinite().all() for value in result.values())


def test_the_shared_expert_computes_while_tokens_travel() -> None:
    for events in run_ranks(expert_models.traced, 2, preload=TRAINING):
        there, back = ["launch", "launch", "shared", "wait", "wait"], ["launch", "wait"]
        assert events["forward"] == ["counts", *there, *back]
        assert events["backward"] == [*back, *there]


def test_zaya_router_state_follows_the_slices_of_the_sequence() -> None:
    x, upstream = (
        torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)
    )
    layers, whole = two_zaya_layers(), x.clone().requires_grad_()
    y, state = through_zaya(layers, whole)
    (y * upstream).sum().backward()
    results = run_ranks(expert_models.zaya_slices, 2, x, upstream, preload=TRAINING)
    for got, wanted in zip(zip(*results), (y, state, whole.grad, None)):
        if wanted is not None:
            assert_close(torch.cat(got, dim=1), wanted)
    gamma: Any = layers[1].router.gamma
    assert_close(results[0][3] + results[1][3], gamma.grad)
    # The state does matter here: without it, other experts are chosen.
    assert (through_zaya(layers[1:], x)[1] - state).abs().max() > 0.1


@pytest.mark.parametrize(
    ("ffn", "sizes", "message"),
    [
        ("top1", {"ep": 3}, r"experts=4 of blocks.0.ffn \(MoE\) cannot be cut over mesh.ep=3; .* mesh.ep 1, 2, 4$"),
        ("zaya", {"ep": 8}, r"experts=4 .* mesh.ep 1, 2, 4$"),
        ("top3", {"ep": 2, "tp": 3, "expert_tensor": True}, r"hidden=4 .* mesh.tp=3; .* mesh.tp 1, 2, 4$"),
        ("union", {"ep": 2, "tp": 2}, r"mesh.ep=2 with mesh.tp=2: .* set mesh.ep=1 or mesh.tp=1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(ffn: str, sizes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = Decoder(config(ffn))
    with pytest.raises(ValueError, match=message):
        check_experts(model, **sizes)
    check_experts(model, 1)


def test_what_has_no_experts_to_share_out_says_so() -> None:
    fields = {"mixers": {"attention": {"kind": "attention", "heads": 2}}, "vocabulary": 32, "width": 16}
    plain = {"ffns": {"swiglu": {"kind": "swiglu", "hidden": 8}}, "layers": ["attention + swiglu"]}
    union = {"kind": "union_of_experts", "experts": 4, "top_k": 2, "hidden": 32, "activation": "gelu"}
    with torch.device("meta"):
        dense = Decoder(type(config("top1")).model_validate({**fields, **plain}))
        gelu = Decoder(
            type(config("top1")).model_validate({**fields, "ffns": {"u": union}, "layers": ["attention + u"]})
        )
    with pytest.raises(ValueError, match=r"mesh.ep=2 shares out experts, but the model has none"):
        check_experts(dense, 2)
    with pytest.raises(ValueError, match=r"choose activation=swiglu and bias=false, or mesh.ep=1"):
        check_experts(gelu, 2)


def test_stages_balance_their_own_layers_and_record_all() -> None:
    (first, bias), (second, other) = run_ranks(expert_models.balanced_stages, 2, (0, 1), preload=TRAINING)
    assert first == second and first["load_entropy"] == {"blocks.0": pytest.approx(0.8113), "blocks.1": 0.0}
    assert bias == [-0.5, 0.5] and other == [0.5, -0.5]
    for record, _ in run_ranks(expert_models.balanced_stages, 2, (1,), preload=TRAINING):
        assert record["load_entropy"] == {"blocks.1": 0.0}
