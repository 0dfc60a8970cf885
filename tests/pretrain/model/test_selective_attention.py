"""Selective attention: multi-head attention when every head takes every token, packed equal to masked, causal in every form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention
from pretrain.model.mixers import selective_attention
from pretrain.model.mixers.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from pretrain.model.rotary import apply_rotary
from pretrain.model.union_conversion import join_columns, join_sections, split_columns, split_sections
from tests.pretrain.model.union_probes import FORMS, context, drawn, fixed, leak, released, run

HEADS: dict[str, dict[str, Any]] = {
    "a head each": {},
    "grouped keys": {"heads": 8, "head_dim": 4, "kv_heads": 4},
    "groups of heads": {"heads": 8, "head_dim": 4, "experts": 4, "rope_fraction": 0.5, "qk_norm": False},
}
BORDERS = [0, 1, 8, 8, 19, 21, 36]


def smha(width: int = 16, **options: Any) -> SelectiveAttention:
    return drawn(SelectiveAttentionConfig(**{"heads": 4, **options}).build(width))


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged(B: int, T: int, experts: int = 4) -> torch.Tensor:
    """A mask with an expert that nobody uses, one that takes all, and a token that nobody takes."""
    mask = torch.rand(B, T, experts, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[..., 0], mask[..., 1] = True, False
    mask[:, T // 2] = False
    return mask


# -------------------------------------------------------------------------------------------- multi-head attention, cut


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "routing",
    [
        {"select": "all"},
        {"top_k": 4, "router_gradient": "none"},
        {"select": "threshold", "mean_load": 1.0, "router_gradient": "none"},
        {"top_k": 4},
    ],
)
@pytest.mark.parametrize("borders", [None, BORDERS])
def test_all_tokens_in_all_heads_are_multi_head_attention(heads: str, routing: dict, borders: list | None) -> None:
    config = SelectiveAttentionConfig(**{"heads": 4, **HEADS[heads], **routing})
    mixer, plain = drawn(config.build(16)), config.dense().build(16).double()
    sections = list(plain.sections)
    with torch.no_grad():
        plain.qkv.weight.copy_(inputs(*plain.qkv.weight.shape, seed=5) * 0.4)
        plain.out.weight.copy_(inputs(*plain.out.weight.shape, seed=6) * 0.4)
        mixer.qkv.copy_(split_sections(plain.qkv.weight, sections, 4))
        mixer.out.copy_(split_columns(plain.out.weight, 4))
        if plain.q_norm is not None:
            for name in ("q_norm", "k_norm"):
                getattr(plain, name).copy_(1 + 0.1 * inputs(plain.head_dim))
                getattr(mixer, name).copy_(getattr(plain, name))
    shape = (2, 18, 16) if borders is None else (1, 36, 16)
    x, again = inputs(*shape).requires_grad_(), inputs(*shape).requires_grad_()
    sequence = context(*shape[:2], borders)
    expected, actual = plain(x, sequence), mixer(again, sequence)
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(actual, expected, **close)
    upstream = inputs(*shape, seed=7)
    expected.backward(upstream)
    actual.backward(upstream)
    torch.testing.assert_close(mixer.qkv.grad, split_sections(plain.qkv.weight.grad, sections, 4), **close)
    torch.testing.assert_close(mixer.out.grad, split_columns(plain.out.weight.grad, 4), **close)
    if routing != {"top_k": 4}:  # there the router's gradient flows on into the input
        torch.testing.assert_close(again.grad, x.grad, **close)
    if plain.q_norm is not None:
        torch.testing.assert_close(mixer.k_norm.grad, plain.k_norm.grad, **close)


def test_shards_go_back_to_the_same_bits() -> None:
    weight, out = inputs(8 * 4 + 2 * 4 * 4, 6), inputs(6, 32)
    shards = split_sections(weight, [32, 16, 16], 2)
    assert torch.equal(shards[1, :, 16:24], weight[32 + 8 : 32 + 16].T)  # the keys of the second expert
    assert torch.equal(join_sections(shards, [32, 16, 16]), weight)
    assert torch.equal(join_columns(split_columns(out, 2)), out)


# ------------------------------------------------------------------------------------------------------ the packed form


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("borders", [None, BORDERS])
@pytest.mark.parametrize("form", ["ragged", "token choice", "mean-one gates", "experts, then threshold, capacity"])
def test_packed_heads_equal_masked_heads(heads: str, borders: list | None, form: str) -> None:
    mixer = smha(**HEADS[heads], **FORMS.get(form, {"select": "all"}))
    shape = (3, 12, 16) if borders is None else (1, 36, 16)
    if form == "ragged":
        mixer.routing.forward = fixed(ragged(*shape[:2]))
    x, again = inputs(*shape).requires_grad_(), inputs(*shape).requires_grad_()
    sequence, upstream = context(*shape[:2], borders), inputs(*shape, seed=7)
    gradients = []
    for f, row in ((mixer.masked, x), (mixer, again)):
        y = f(row, sequence)
        mixer.zero_grad()
        y.backward(upstream)
        gradients.append([y.detach(), row.grad, *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)])
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_token_that_nobody_takes_gets_exactly_zero_and_is_seen_by_nobody() -> None:
    mixer, x = smha(select="all"), inputs(2, 12, 16)
    mask = ragged(2, 12)
    mixer.routing.forward = fixed(mask)
    y = run(mixer, x)
    assert y[:, 6].abs().max() == 0 and y[:, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]].abs().amax(-1).min() > 1e-3
    changed = x.clone()
    changed[:, 6] += 1.0
    assert torch.equal(run(mixer, changed), y)
    mixer.routing.forward = fixed(torch.zeros_like(mask))
    empty = run(mixer, x)
    empty.sum().backward()
    assert empty.abs().max() == 0 and mixer.qkv.grad.abs().max() == 0


def test_single_token_of_a_head_attends_to_itself_only() -> None:
    mixer, x = smha(select="all"), inputs(1, 9, 16)
    mask = torch.zeros(1, 9, 4, dtype=torch.bool)
    mask[0, 5, 2] = True
    mixer.routing.forward = fixed(mask)
    y = run(mixer, x)
    torch.testing.assert_close(y[0, 5], x[0, 5] @ mixer.qkv[2][:, 8:] @ mixer.out[2], rtol=1e-12, atol=1e-12)
    assert y[0, [0, 1, 2, 3, 4, 6, 7, 8]].abs().max() == 0


def test_rotations_are_by_original_positions() -> None:
    mixer, x = smha(select="all", heads=1, qk_norm=False), inputs(1, 12, 16)
    mask = torch.zeros(1, 12, 1, dtype=torch.bool)
    mask[0, [2, 9]] = True
    mixer.routing.forward = fixed(mask)
    q, k, v = (x[0] @ mixer.qkv[0]).split(16, dim=-1)
    cos, sin = context(1, 12).rotary(16, 10_000.0)
    q, k = (apply_rotary(part[None, :, None], cos, sin)[0, :, 0] for part in (q, k))
    weights = (torch.stack([q[9] @ k[2], q[9] @ k[9]]) / 4).softmax(-1)
    expected = (weights[0] * v[2] + weights[1] * v[9]) @ mixer.out[0]
    torch.testing.assert_close(run(mixer, x)[0, 9], expected, rtol=1e-6, atol=1e-6)  # angles are fp32


def test_order_of_experts_changes_nothing() -> None:
    mixer, x, order = smha(top_k=2), inputs(2, 12, 16), torch.tensor([2, 0, 3, 1])
    before = run(mixer, x)
    with torch.no_grad():
        for weight in (mixer.qkv, mixer.out, mixer.routing.data_router.weight):
            weight.copy_(weight[order].clone())
    torch.testing.assert_close(run(mixer, x), before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("form", FORMS)
def test_no_output_depends_on_later_tokens(form: str) -> None:
    mixer, x = smha(**FORMS[form]), inputs(3, 24, 16)
    for t in (1, 5, 8, 13, 23):
        assert leak(lambda rows: run(mixer, rows), x, t) < 1e-14
        assert leak(lambda rows: mixer.masked(rows, context(3, 24)), x, t) < 1e-14


@pytest.mark.parametrize(("fill", "top_k"), [(True, 2), (False, 4), (False, 2)])
def test_the_same_probe_finds_the_leak_of_the_released_rule(fill: bool, top_k: int) -> None:
    mixer, x = smha(select="all"), inputs(3, 24, 16)
    mixer.routing.forward = released(inputs(4, 16, seed=7), top_k, fill)
    assert leak(lambda rows: run(mixer, rows), x, 13) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_alone_in_a_batch_and_packed(form: str) -> None:
    mixer, x = smha(**FORMS[form]), inputs(3, 12, 16)
    together = run(mixer, x)
    for row in range(3):
        torch.testing.assert_close(run(mixer, x[row : row + 1])[0], together[row], rtol=1e-11, atol=1e-12)
    packed = x.reshape(1, 36, 16)
    y = run(mixer, packed, context(1, 36, BORDERS))
    alone = [run(mixer, packed[:, a:b]) for a, b in pairwise(BORDERS) if a < b]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)
    changed = packed.clone()
    changed[:, 8:19] += 1.0
    difference = (run(mixer, changed, context(1, 36, BORDERS)) - y).abs().amax(-1)[0]
    assert difference[:8].max() < 1e-14 and difference[19:].max() < 1e-14 and difference[8:19].max() > 0.1


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [False, True])
def test_pieces_with_a_cache_equal_one_pass(form: str, heads: str, grad: bool) -> None:
    mixer, x = smha(**HEADS[heads], **FORMS[form]), inputs(3, 24, 16)
    cache: dict[str, Any] = {}
    parts, seen = [], 0
    with torch.set_grad_enabled(grad):
        for piece in x.split([5, 1, 1, 9, 1, 7], dim=1):
            parts.append(run(mixer, piece, context(3, piece.shape[1], offset=seen), cache))
            seen += piece.shape[1]
    whole = run(mixer, x)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-11)
    if grad:
        upstream = inputs(3, 24, 16, seed=4)
        ours, expected = (
            torch.autograd.grad(y, mixer.qkv, upstream) for y in (torch.cat(parts, dim=1), whole)
        )  # no call has overwritten what an earlier one's gradient needs
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_cache_holds_each_heads_own_tokens_only() -> None:
    mixer, x = smha(select="all", qk_norm=False, rope_fraction=0.0), inputs(2, 12, 16)
    mask = ragged(2, 12)
    cache: dict[str, Any] = {}
    with torch.no_grad():
        for t in range(12):
            mixer.routing.forward = fixed(mask[:, t : t + 1])
            run(mixer, x[:, t : t + 1], context(2, 1, offset=t), cache)
    assert cache["count"].view(4, 2).tolist() == mask.sum(1).T.tolist()
    assert cache["taken_k"].shape[1] < 1.5 * 11 and cache["taken_k"].shape[2:] == (1, 4)
    values = cache["taken_v"].view(4, 2, -1, 4)
    for expert in range(4):
        for row in range(2):
            kept = x[row][mask[row, :, expert]] @ mixer.qkv[expert][:, 8:]
            torch.testing.assert_close(values[expert, row, : len(kept)], kept, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- learning, counts, configs


@pytest.mark.parametrize("form", [form for form in FORMS if form != "mean-one gates"])
def test_every_router_gets_a_gradient_unless_it_is_switched_off(form: str) -> None:
    for gradient in ("straight_through", "none"):
        mixer = smha(**{**FORMS[form], "router_gradient": gradient})
        run(mixer, inputs(2, 16, 16)).square().sum().backward()
        for weight in mixer.routing.parameters():
            assert (weight.grad is None) if gradient == "none" else (weight.grad.abs().max() > 1e-3)


def test_training_moves_the_router_and_holds_the_load() -> None:
    mixer = drawn(SelectiveAttentionConfig(heads=4, select="threshold", mean_load=0.4).build(8), std=0.3).train()
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)
    teacher = inputs(8, 8, seed=8)
    started = mixer.routing.data_router.weight.detach().clone()
    losses = []
    for step in range(120):
        x = inputs(4, 24, 8, seed=100 + step)
        loss = (run(mixer, x) - x @ teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for module in mixer.modules():
            if hasattr(module, "rebalance"):
                module.rebalance(module.load.clone())
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert (mixer.routing.data_router.weight - started).abs().max() > 0.1
    mask = mixer.eval().routing(inputs(32, 64, 8, seed=99), context(32, 64)).mask
    torch.testing.assert_close(mask.double().mean((0, 1)), torch.full((4,), 0.4).double(), atol=0.06, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_parameter_and_flop_counts(heads: str) -> None:
    mixer = smha(**HEADS[heads], top_k=2)
    plain = SelectiveAttentionConfig(**{"heads": 4, **HEADS[heads], "select": "all"}).dense().build(16)
    total = sum(p.numel() for p in plain.parameters())
    norms = 0 if plain.q_norm is None else 2 * plain.head_dim
    assert sum(p.numel() for p in mixer.parameters()) == total + 4 * 16
    assert mixer.active_parameters() == (total - norms) // 2 + norms + 4 * 16
    channels = plain.heads * plain.head_dim
    linear, scores = plain.flops_per_token(0.0), 4.0 * channels * 30.0
    assert mixer.flops_per_token(30.0) == linear / 2 + scores / 4 + 2 * 4 * 16


def test_work_done_is_that_of_the_selected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, lengths = smha(top_k=2), inputs(2, 20, 16), []

    def counted(q: torch.Tensor, *arguments: Any, cu_seqlens: torch.Tensor) -> torch.Tensor:
        lengths.append(cu_seqlens.diff())
        return attention(q, *arguments, cu_seqlens=cu_seqlens)

    monkeypatch.setattr(selective_attention, "attention", counted)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(mixer, x)
    projections = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert projections == 40 * mixer.flops_per_token(0.0)  # half of the dense ones, and the router
    sizes = mixer.routing(x, context(2, 20)).mask.sum(1)  # [B, n]
    assert len(lengths) == 1 and lengths[0].tolist() == sizes.T.flatten().tolist()
    # Scores over all pairs of each list: 4 d sum |S_i|^2, which the estimate gives for lists of equal length.
    pairs = 8 * 10**2
    assert 20 * 2 * (mixer.flops_per_token(20.0) - mixer.flops_per_token(0.0)) == 4 * 4 * pairs
    assert 0.9 * pairs < int(lengths[0].square().sum()) < 1.5 * pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5 is more than the 4 experts"),
        ({"heads": 3, "top_k": 1}, "heads=3 does not divide width=16"),
        ({"kv_heads": 3, "top_k": 1}, "kv_heads=3 does not divide heads=4"),
        ({"experts": 3, "top_k": 1}, "experts=3 does not divide kv_heads=4; choose one of 1, 2, 4"),
        ({"heads": 4, "kv_heads": 2, "experts": 4, "top_k": 1}, "experts=4 does not divide kv_heads=2"),
        ({"select": "threshold"}, "select=threshold needs mean_load"),
        ({"top_k": 1, "mean_load": 0.5}, "mean_load=0.5 with select=token_choice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveAttentionConfig(**{"heads": 4, **options}).build(16)


@pytest.mark.parametrize("form", ["token choice", "experts, then threshold, capacity"])
def test_bf16_autocast_is_near_and_finite(form: str) -> None:
    mixer, x = smha(**FORMS[form]).float(), inputs(2, 20, 16).float()
    wide = run(mixer, x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = run(mixer, x)
    assert narrow.dtype == torch.bfloat16
    narrow.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in mixer.parameters())
    assert (narrow - wide).norm() < 0.02 * wide.norm()
