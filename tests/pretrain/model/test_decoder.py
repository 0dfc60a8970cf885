"""The decoder's configuration, its counts, and its routers."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.ffns.hourglass import Hourglass, HourglassConfig
from pretrain.model.ffns.swiglu import SwiGLU
from pretrain.model.pattern import expand
from pretrain.model.router import Router
from pretrain.train.balance import load_entropy
from tests.pretrain.small import MODEL, decoder, tokens


def test_a_name_alone_is_a_layer_with_that_sublayer_only() -> None:
    assert expand(["gdn x2", "moe", "gdn + moe"], 1, ["gdn"], ["moe"]) == [
        ("gdn", None), ("gdn", None), (None, "moe"), ("gdn", "moe")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="means a mixer and an FFN of that name"):
        expand(["gdn"], 1, ["gdn"], ["gdn"])
    separate, together = decoder(layers=["attention", "swiglu"]), decoder(layers=["attention + swiglu"])
    state = {name.replace("blocks.1.", "blocks.0."): value for name, value in separate.state_dict().items()}
    together.load_state_dict(state)
    assert torch.equal(separate(tokens(2, 7)), together(tokens(2, 7)))


def test_pattern_expands_counts_and_repeats() -> None:
    pairs = expand(["gdn + moe x3", "attention+dense"], 2, ["gdn", "attention"], ["moe", "dense"])
    assert pairs == ([("gdn", "moe")] * 3 + [("attention", "dense")]) * 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gdn +", "write 'mixer \\+ ffn'"),
        ("gdn x0", "write 'mixer \\+ ffn'"),
        ("moe", "no layer has a mixer; add one, such as 'gdn'"),
        ("gdn + moe x", "write 'mixer \\+ ffn'"),
        ("gdm + moe", "did you mean 'gdn'"),
        ("gdn + mow", "did you mean 'moe'"),
    ],
)
def test_pattern_errors_name_the_fix(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([entry], 1, ["gdn"], ["moe"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": {**MODEL["mixers"], "gdn": {"kind": "gated_delta_net", "heads": 2, "value_heads": 3}}}, "multiple"),
        ({"mixers": {**MODEL["mixers"], "attention": {"kind": "attention", "heads": 3}}}, "does not divide width=32"),
        ({"mixers": {**MODEL["mixers"], "attention": {"kind": "attention", "heads": 4, "kv_heads": 3}}}, "kv_heads=3"),
        ({"ffns": {**MODEL["ffns"], "moe": {"kind": "moe", "experts": 2, "top_k": 3, "hidden": 8}}}, "top_k=3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(DecoderConfig.model_validate({**MODEL, **change}))


def test_unknown_sublayer_name_is_a_validation_error() -> None:
    with pytest.raises(ValidationError, match="did you mean 'attention'"):
        DecoderConfig.model_validate({**MODEL, "layers": ["atention + moe"]})


def test_loss_is_the_summed_cross_entropy_of_the_logits() -> None:
    model = decoder()
    row, targets = tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, 3:] = -100
    expected = torch.nn.functional.cross_entropy(
        model(row).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(model(row, targets=targets), expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    model = decoder()
    model(tokens(2, 50), targets=tokens(2, 50, seed=1)).backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_untied_head_is_its_own_parameter() -> None:
    model = decoder(tie_embeddings=False)
    assert model.head is not None and model.head.weight is not model.embedding.weight


def test_hourglass_of_one_full_sub_mlp_is_the_usual_sublayer() -> None:
    torch.manual_seed(0)
    stack = Hourglass(16, HourglassConfig(hidden=24, depth=1))
    plain = SwiGLU(16, 24)
    plain.load_state_dict(stack.stack[0].state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(stack(x), x + plain(stack.norms[0](x)))


def test_hourglass_sees_the_updated_stream_and_its_updates_are_narrow() -> None:
    torch.manual_seed(0)
    stack = Hourglass(16, HourglassConfig(hidden=3, depth=2)).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    first = x + stack.stack[0](stack.norms[0](x))
    update = stack(x) - first
    torch.testing.assert_close(update, stack.stack[1](stack.norms[1](first)))
    assert torch.linalg.matrix_rank(update[0]) == 3


def test_parameter_and_flop_counts_by_hand() -> None:
    config = {
        "vocabulary": 10,
        "width": 8,
        "mixers": {"attention": {"kind": "attention", "heads": 2, "kv_heads": 1, "qk_norm": False}},
        "ffns": {"moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 5}},
        "layers": ["attention + moe"],
    }
    model = Decoder(DecoderConfig.model_validate(config))
    attention, expert, router = 8 * (8 + 4 + 4) + 8 * 8, 3 * 8 * 5, 4 * 8
    embedding, norms = 10 * 8, 3 * 8
    assert sum(p.numel() for p in model.parameters()) == embedding + norms + attention + router + 4 * expert
    assert model.active_parameters() == embedding + norms + attention + router + 2 * expert
    keys = 7.5
    scores = 2 * 2 * 8 * keys  # q k^T and p v over all heads' channels
    assert model.flops_per_token(keys) == 2 * (embedding + attention + router + 2 * expert) + scores


def test_router_bias_moves_the_choice_but_not_the_weights() -> None:
    torch.manual_seed(0)
    router = Router(8, 4, 2, "sigmoid", 1.0, 0.1)
    router.init_weights(0.5)
    x = torch.randn(100, 8)
    _, scores = router(x)
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(100))
    router.bias[2] = 10.0
    indices, scores = router(x)
    assert (indices == 2).any(dim=-1).all()
    raw = (x @ router.weight.T).sigmoid().gather(-1, indices)
    torch.testing.assert_close(scores, raw / raw.sum(dim=-1, keepdim=True))


def test_balancing_moves_bias_towards_starved_experts_and_evens_the_load() -> None:
    torch.manual_seed(0)
    router = Router(8, 4, 1, "softmax", 1.0, 0.01)
    router.init_weights(0.5)
    x = torch.randn(400, 8) + 1.0  # a common direction: some experts start with nearly everything
    router(x)
    start = router.load.clone()
    router.rebalance(router.load.clone())
    torch.testing.assert_close(router.bias, 0.01 * (100 - start.float()).sign())
    assert router.load.sum() == 0
    for _ in range(200):
        router(x)
        last = router.load.clone()
        router.rebalance(last)
    assert load_entropy(last) > 0.99 > load_entropy(start)
    router.eval()
    router(x)
    assert router.load.sum() == 0  # evaluation does not count


def test_load_entropy_bounds() -> None:
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([20, 0, 0, 0])) == pytest.approx(0.0)
    assert load_entropy(torch.tensor([10, 10, 0, 0])) == pytest.approx(0.5)


def test_initial_scale_shrinks_with_depth() -> None:
    model = decoder(layers=["attention + swiglu x8"], init_std=0.02, width=64)
    block = model.blocks[3]
    assert block.mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mixer.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.1)
