"""The sparse FFN: gates, groups, shared experts, balancing losses, and balancing itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.model.ffns.moe import MoE, MoEConfig
from pretrain.model.router import Router
from pretrain.model.router_losses import batch_loss, sequence_loss, z_loss
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, init_normal
from pretrain.train.balance import load_entropy
from tests.pretrain.small import FFNS, decoder, tokens


def moe(width: int = 8, seed: int = 0, **fields: Any) -> MoE:
    torch.manual_seed(seed)
    ffn = MoEConfig(**{"experts": 6, "top_k": 2, "hidden": 5, **fields}).build(width)
    init_normal(ffn, 0.5)
    ffn.router.init_weights(0.5)
    ffn.init_weights(0.5)
    return ffn.double()


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(ffn: MoE, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    sequence = SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), cu_seqlens)
    y, carry = ffn(x, sequence, None, Carry())
    return y, carry.auxiliary


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_by_hand(gate: Any, normalize: bool) -> None:
    ffn, x = moe(gate=gate, normalize=normalize, route_scale=2.0, shared_hidden=3, shared_gate=True), rows(1, 7, 8)
    ffn.router.bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0, 0.5]))
    y, _ = apply(ffn.eval(), x)
    for t in range(7):
        token = x[0, t]
        logits = token @ ffn.router.weight.T
        score = logits.softmax(0) if gate == "softmax" else logits.sigmoid()
        chosen = sorted(range(6), key=lambda e, s=score: -(s[e] + ffn.router.bias[e]).item())[:2]
        total = sum(score[e] for e in chosen) if normalize else 1.0
        expected = sum(2.0 * score[e] / total * swiglu(token, ffn.gate_up[e], ffn.down[e]) for e in chosen)
        shared = swiglu(token, ffn.shared.gate_up.weight.T, ffn.shared.down.weight.T)
        expected = expected + (token @ ffn.shared_gate.weight[0]).sigmoid() * shared
        torch.testing.assert_close(y[0, t], expected, rtol=1e-10, atol=1e-10)


def test_a_token_stays_within_its_best_groups() -> None:
    torch.manual_seed(0)
    router = Router(8, 12, 3, "sigmoid", 1.0, 0.0, groups=4, top_groups=2)
    router.init_weights(1.0)
    x = torch.randn(200, 8)
    indices, _ = router(x)
    score = (x @ router.weight.T).sigmoid().view(200, 4, 3)
    best = score.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    allowed = torch.zeros(200, 4, dtype=torch.bool).scatter(1, best, True)
    assert allowed.gather(1, indices // 3).all()
    within = score.masked_fill(~allowed[..., None], 0.0).flatten(1).topk(3, dim=-1).values
    torch.testing.assert_close(score.flatten(1).gather(1, indices).sort(descending=True).values, within)
    free = Router(8, 12, 3, "sigmoid", 1.0, 0.0)
    free.load_state_dict(router.state_dict())
    assert not torch.equal(free(x)[0].sort().values, indices.sort().values)


def test_several_shared_experts_are_one_wide_one() -> None:
    ffn, x = moe(shared_hidden=6), rows(1, 4, 8)
    gate, up = ffn.shared.gate_up.weight.chunk(2)
    parts = [
        swiglu(x, torch.cat((gate[p : p + 3], up[p : p + 3])).T, ffn.shared.down.weight[:, p : p + 3].T) for p in (0, 3)
    ]
    torch.testing.assert_close(ffn.shared(x), parts[0] + parts[1])


def test_losses_by_hand() -> None:
    affinity = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]], dtype=torch.float64)
    counts = torch.tensor([2, 0, 2])
    # 3 * sum_i f_i P_i * 4 tokens, f = (1/2, 0, 1/2), P = (1.5, 1.1, 1.4) / 4
    assert batch_loss(affinity, counts).item() == pytest.approx(3 * (0.5 * 1.5 + 0.5 * 1.4))
    # first two tokens: f = (1, 0, 0), P = (0.6, ..); last two: f = (0, 0, 1), P = (.., 0.6); each times 2 tokens
    owner = torch.tensor([0, 0, 1, 1])
    assert sequence_loss(affinity, 1, owner, 2).item() == pytest.approx(3 * 0.6 * 2 + 3 * 0.6 * 2)
    # top 2 of one sequence: f = counts / (2 * 4) = (3, 3, 2) / 8; the last token's tie between 0 and 1 goes either way
    tied = sequence_loss(affinity[:3], 2, torch.zeros(3, dtype=torch.int64), 1).item()
    assert tied == pytest.approx(3 * (2 / 6 * 1.3 + 3 / 6 * 0.9 + 1 / 6 * 0.8))
    logits = torch.tensor([[1.0, 2.0], [0.0, -3.0]])
    expected = sum(torch.exp(row).sum().log().item() ** 2 for row in logits)
    assert z_loss(logits).item() == pytest.approx(expected)


def test_even_routing_costs_one_nat_a_token() -> None:
    affinity = torch.full((12, 4), 0.25)
    assert batch_loss(affinity, torch.tensor([6, 6, 6, 6])).item() == pytest.approx(12.0)
    even = torch.eye(4).repeat(3, 1) * 0.01 + affinity - 0.0025  # a slight preference, each expert's turn
    assert sequence_loss(even, 1, torch.zeros(12, dtype=torch.int64), 1).item() == pytest.approx(12.0)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, 9, 20]])
def test_losses_join_the_carry_in_training(cu_seqlens: list[int] | None) -> None:
    ffn = moe(gate="sigmoid", batch_loss=0.5, sequence_loss=0.25, z_loss=0.125)
    ffn.router.bias.copy_(torch.linspace(-1, 1, 6))
    x = rows(2, 10, 8) if cu_seqlens is None else rows(1, 20, 8)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    _, auxiliary = apply(ffn, x, borders)
    flat = x.flatten(0, 1)
    logits = flat @ ffn.router.weight.T
    affinity = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = 0.5 * batch_loss(affinity, ffn.router.load) + 0.125 * z_loss(logits)
    for begin, end in [(0, 10), (10, 20)] if cu_seqlens is None else [(0, 1), (1, 9), (9, 20)]:
        part = affinity[begin:end]
        share = torch.bincount(part.topk(2).indices.flatten(), minlength=6) / (2 * (end - begin))
        expected = expected + 0.25 * 6 * (share * part.mean(0)).sum() * (end - begin)
    assert auxiliary is not None
    torch.testing.assert_close(auxiliary, expected)
    auxiliary.backward()
    assert ffn.router.weight.grad.any() and ffn.gate_up.grad is None
    assert apply(ffn.eval(), x, borders)[1] is None
    silent = moe()
    assert apply(silent, x, borders)[1] is None


def test_batch_loss_sees_the_reduced_load() -> None:
    ffn, x = moe(batch_loss=1.0), rows(1, 20, 8)
    _, alone = apply(ffn, x)
    counts = ffn.router.load.clone()
    everything = torch.tensor([100, 0, 0, 0, 0, 0])
    ffn.reduce_load = lambda load: load + everything
    _, reduced = apply(ffn, x)
    affinity = ffn.router.route(x[0]).affinity
    torch.testing.assert_close(alone, batch_loss(affinity, counts))
    torch.testing.assert_close(reduced, batch_loss(affinity, counts + everything))


def test_batch_losses_of_ranks_add_up_to_the_loss_of_the_whole_batch() -> None:
    ffn, x = moe(gate="softmax", batch_loss=1.0), rows(4, 10, 8)
    _, whole = apply(ffn, x)
    total = ffn.router.load.clone()
    ffn.reduce_load = lambda load: total
    parts = [apply(ffn, x[i : i + 2])[1] for i in (0, 2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_owners_of_rows_and_of_packed_sequences() -> None:
    dense = SequenceContext.of(torch.zeros(2, 3, dtype=torch.int64), None)
    assert dense.owners()[0].tolist() == [0, 0, 0, 1, 1, 1] and dense.owners()[1] == 2
    packed = SequenceContext.of(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([0, 2, 2, 6], dtype=torch.int32))
    assert packed.owners()[0].tolist() == [0, 0, 2, 2, 2, 2] and packed.owners()[1] == 3


def test_auxiliary_losses_reach_the_gradient_but_not_the_decoders_loss() -> None:
    fields = {**FFNS["qwen"], "batch_loss": 0.0, "z_loss": 0.0}
    plain = decoder(ffns={"moe": fields}, layers=["attention + moe"])
    weighted = decoder(ffns={"moe": {**fields, "z_loss": 1.0}}, layers=["attention + moe"])
    row, targets = tokens(2, 20), tokens(2, 20, seed=1)
    losses = [model(row, targets=targets) for model in (plain, weighted)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    gradients = [model.blocks[0].ffn.router.weight.grad for model in (plain, weighted)]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def skewed(experts: int, seed: int = 0) -> tuple[Router, Tensor]:
    """A router and tokens with a common direction, so that a few experts start with nearly everything."""
    torch.manual_seed(seed)
    router = Router(8, experts, 2, "sigmoid", 1.0, 0.01)
    router.init_weights(0.5)
    return router, torch.randn(600, 8) + 1.0


def test_bias_evens_a_skewed_router() -> None:
    router, x = skewed(8)
    router(x)
    start = load_entropy(router.load)
    for _ in range(150):
        router.load.zero_()
        router(x)
        last = router.load.clone()
        router.rebalance(last)
    assert load_entropy(last) > 0.99 > 0.9 > start


@pytest.mark.parametrize("loss", ["batch", "sequence"])
def test_the_loss_alone_evens_a_skewed_router(loss: str) -> None:
    router, x = skewed(8)
    router(x)
    start = load_entropy(router.load)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        routing, owner = router.route(x), torch.zeros(600, dtype=torch.int64)
        counts = torch.bincount(routing.indices.flatten(), minlength=8)
        value = (
            batch_loss(routing.affinity, counts) if loss == "batch" else sequence_loss(routing.affinity, 2, owner, 1)
        )
        optimizer.zero_grad()
        (value / 600).backward()
        optimizer.step()
    assert load_entropy(counts) > 0.99 > 0.9 > start


def test_active_parameters_and_flops_count_the_chosen_experts() -> None:
    ffn = moe(experts=6, top_k=2, hidden=5, shared_hidden=3, shared_gate=True)
    dense = 6 * 8 + 3 * 8 * 3 + 8
    assert ffn.active_parameters() == dense + 2 * 3 * 8 * 5
    assert ffn.flops_per_token(0.0) == 2 * (dense + 2 * 3 * 8 * 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7}, "top_k=7 is more than experts=6; choose at most 6"),
        ({"shared_gate": True}, "shared_gate=true needs a shared expert; set shared_hidden"),
        ({"groups": 4}, "groups=4 does not cut experts=6"),
        ({"groups": 6}, "groups=6 does not cut experts=6"),
        ({"groups": 2, "top_groups": 3}, "top_groups=3 is more than groups=2"),
        ({"groups": 3, "top_groups": 1, "top_k": 3}, "top_k=3 is more than the 2 experts of top_groups=1"),
    ],
)
def test_mistakes_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe(**fields)
