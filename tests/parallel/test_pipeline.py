"""Pipelines of 2 and 4 ranks against one rank: every loss, gradient, parameter and expert load over two steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from parallel.pipeline import Plan, cut
from parallel.pipeline.deferred import WeightGradients
from pretrain.model.decoder import Decoder
from pretrain.model.stage import Stage
from tests.parallel.pipeline_ranks import Case, Outcome, alone, buffers_left, in_a_pipeline, refused
from tests.pretrain.families import build
from tests.ranks import run_ranks

ZAYA = ("ZAYA1", ["cca + zaya_moe x6"])
KIMI = ("Kimi-Linear", ["kda + swiglu", "mla + moe", "kda + moe x2", "mla + moe"])
QWEN = ("Qwen3-Next", ["gated_delta_net + moe_softmax x2", "gated_attention + moe_softmax x2"])
FURTHER = ("multi-token", ["attention + swiglu x2", "gla + moe", "attention + swiglu"])
CASES = {
    2: {
        "1f1b, routers' state, tied": Case(*ZAYA, "1f1b", (4, 2), 3),
        "1f1b, auxiliary losses, a stage without layers": Case(*QWEN, "1f1b", (4, 0), 2, tied=False),
        "1f1b, tied, fp32": Case(*KIMI, "1f1b", (2, 3), 2, dtype=torch.float32),
        "1f1b, multi-token": Case(*FURTHER, "1f1b", (2, 2), 2, tied=False),
        "interleaved, routers' state": Case(*ZAYA, "interleaved", (1, 2, 2, 1), 4, tied=False),
        "interleaved, tied, multi-token": Case(*FURTHER, "interleaved", (1, 1, 1, 1), 2),
        "interleaved, fewer micro-batches than ranks": Case(*KIMI, "interleaved", (2, 1, 1, 1), 1),
        "zbv, routers' state, tied": Case(*ZAYA, "zbv", (1, 2, 2, 1), 5),
        "zbv, auxiliary losses, few micro-batches": Case(*QWEN, "zbv", (1, 1, 1, 1), 2, tied=False),
        "zbv, tied, multi-token": Case(*FURTHER, "zbv", (1, 1, 2, 0), 3),
        "1f1b, bf16 autocast": Case(*ZAYA, "1f1b", (4, 2), 2, dtype=torch.float32, autocast=True),
        "zbv, bf16 autocast": Case(*KIMI, "zbv", (1, 2, 1, 1), 2, dtype=torch.float32, autocast=True),
        "zbv, fp32": Case(*KIMI, "zbv", (1, 2, 1, 1), 3, dtype=torch.float32),
    },
    4: {
        "1f1b, routers' state, tied": Case(*ZAYA, "1f1b", (1, 2, 2, 1), 5),
        "interleaved, auxiliary losses, tied": Case(*QWEN, "interleaved", (0, 1, 0, 1, 1, 0, 1, 0), 8),
        "zbv, routers' state": Case(*ZAYA, "zbv", (1, 1, 1, 0, 1, 1, 1, 0), 4, tied=False),
        "1f1b x FSDP2, tied": Case(*KIMI, "1f1b", (3, 2), 3, dp=2),
        "interleaved x FSDP2, tied": Case(*ZAYA, "interleaved", (1, 2, 2, 1), 2, dp=2),
        "zbv x FSDP2, tied": Case(*KIMI, "zbv", (1, 2, 1, 1), 3, dp=2),
    },
}


@pytest.fixture(scope="module", params=list(CASES), ids=lambda world: f"{world} ranks")
def outcomes(request: pytest.FixtureRequest) -> dict[str, tuple[Case, list[Outcome]]]:
    cases = CASES[request.param]
    ranks = run_ranks(in_a_pipeline, request.param, list(cases.values()))
    return {name: (case, [rank[index] for rank in ranks]) for index, (name, case) in enumerate(cases.items())}


def test_equals_one_rank(outcomes: dict[str, tuple[Case, list[Outcome]]]) -> None:
    for title, (case, ranks) in outcomes.items():
        expected, (close, wide) = alone(case), _tolerance(case)
        for rank in ranks:
            assert rank.loss == pytest.approx(expected.loss, rel=close), title
            assert rank.norms == pytest.approx(expected.norms, rel=wide), title
            assert rank.evaluated == pytest.approx(expected.evaluated, rel=close), title
            for step, state in enumerate(rank.states):
                for name, tensor in state.items():
                    want = expected.states[step][name]
                    scale = float(want.abs().max()) or 1.0
                    assert torch.allclose(tensor, want, rtol=0, atol=wide * scale), f"{title}: {name}"
        found = {name for rank in ranks for state in rank.states for name in state}
        assert found == {name for state in expected.states for name in state}, title


def _tolerance(case: Case) -> tuple[float, float]:
    """Relative: of sums, of tensors."""
    return (1e-6, 1e-5) if case.dtype == torch.float32 else (1e-12, 1e-10)


def test_stages_together_have_the_names_of_the_model_and_only_the_shared_table_twice(
    outcomes: dict[str, tuple[Case, list[Outcome]]],
) -> None:
    for title, (case, ranks) in outcomes.items():
        model = case.model()
        for rank in ranks:
            assert rank.gathered.keys() == model.state_dict().keys(), title
        whole = [range(2), range(2, len(model.blocks))]
        first, last = (set(Stage(model, whole, index).state_dict()) for index in range(2))
        doubled = model.head is None or model.multi_token is not None
        assert first & last == ({"embedding.weight"} if doubled else set()), title


def test_nothing_received_is_kept_after_a_step() -> None:
    for schedule, counts in (("1f1b", (2, 2)), ("interleaved", (1, 1, 1, 1)), ("zbv", (1, 1, 1, 1))):
        for rank in run_ranks(buffers_left, 2, Case(*QWEN, schedule, counts, 4)):
            assert rank and all(size == 0 for size, _ in rank)
            assert sum(numbers for _, numbers in rank) > 1000  # the places are there


def test_copies_start_equal_and_the_others_are_shared() -> None:
    model = build("ZAYA1", layers=["cca + zaya_moe x4"])
    first, middle, last = (Stage(model, [range(1), range(1, 3), range(3, 4)], index) for index in range(3))
    assert torch.equal(first.embedding.weight, last.embedding.weight)
    assert first.embedding.weight is model.embedding.weight and last.embedding.weight is not model.embedding.weight
    assert middle.embedding is None and middle.norm is None and first.norm is None and last.norm is model.norm
    assert [len(part.shared()) for part in (first, middle, last)] == [1, 0, 1]
    assert dict(middle.named_parameters()).keys() == {
        n for n, _ in model.named_parameters() if n.startswith(("blocks.1.", "blocks.2."))
    }
    assert first.embedding_scale is model.embedding_scale and last.embedding_scale is None
    assert [type(part.blocks[2]).__name__ for part in (first, middle, last)] == ["NoneType", "Block", "NoneType"]
    assert len(list(middle.routers())) == 2


@pytest.mark.parametrize("family", ["ZAYA1", "Qwen3-Next", "multi-token"])
def test_costs_of_stages_add_up(family: str) -> None:
    model = build(family)
    layers, before, after = model.costs(100.0)
    assert before == 0 and sum(layers) + after == pytest.approx(model.flops_per_token(100.0))
    parts = [Stage(model, [range(1), range(1, len(model.blocks))], index) for index in range(2)]
    assert parts[0].flops_per_token(100.0) == pytest.approx(layers[0])
    assert sum(part.flops_per_token(100.0) for part in parts) == pytest.approx(model.flops_per_token(100.0))


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("ZAYA1", [(1, 7, 32), (1, 7, 16), ()]),
        ("Qwen3-Next", [(1, 7, 32), ()]),
        ("OLMo Hybrid", [(1, 7, 32)]),
    ],
)
def test_only_what_is_needed_crosses(family: str, shapes: list[tuple[int, ...]]) -> None:
    model: Decoder = build(family)
    count = len(model.blocks)
    first, last = (Stage(model, [range(1), range(1, count)], index) for index in range(2))
    assert [tuple(t.shape) for t in first.outgoing(7)] == shapes == [tuple(t.shape) for t in last.incoming(7)]
    assert first.incoming(7) == () and [t.shape for t in last.outgoing(7)] == [()]
    # After the last layer nobody reads the routers' state.
    head_only = Stage(model, [range(count), range(count, count)], 1)
    assert [tuple(t.shape) for t in head_only.incoming(7)] == [shape for shape in shapes if shape != (1, 7, 16)]


def test_cut_is_the_best_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        stages = 2 + trial % 4
        costs = (torch.rand(stages + trial % 5, generator=generator) * 10).tolist()
        first, last = 3.0 * (trial % 2), 12.0 * (trial % 3 > 0)

        def loads(ends: tuple[int, ...]) -> list[float]:
            edges = [0, *ends, len(costs)]  # noqa: B023  used at once
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]  # noqa: B023
            sums[0] += first  # noqa: B023
            sums[-1] += last  # noqa: B023
            return sums

        best = min(
            max(loads(ends)) for ends in itertools.combinations_with_replacement(range(len(costs) + 1), stages - 1)
        )
        found = cut(costs, stages, first, last)
        assert [i for part in found for i in part] == list(range(len(costs))) and len(found) == stages
        assert max(loads(tuple(part.stop for part in found[:-1]))) == pytest.approx(best)
        assert all(len(part) for part in found[1:-1])
        assert (first or len(found[0])) and (last or len(found[-1]))


def test_cut_by_hand() -> None:
    assert cut([1.0] * 6, 3) == [range(2), range(2, 4), range(4, 6)]
    assert cut([1.0] * 9, 2, 0.0, 3.0) == [range(6), range(6, 9)]  # the head weighs as much as three layers
    assert cut([1.0] * 4, 2, 0.0, 9.0) == [range(4), range(4, 4)]  # a head that fills a stage
    assert cut([1.0, 2.0], 1, 5.0, 5.0) == [range(2)]
    with pytest.raises(ValueError, match=r"2 layers cannot be cut into 4 pipeline stages.*mesh.pp_virtual at most 2"):
        cut([1.0, 1.0], 4)


def test_where_stages_are() -> None:
    costs = [1.0] * 8
    assert [Plan.of("1f1b", 4, costs).held_by(r) for r in range(4)] == [[0], [1], [2], [3]]
    assert [Plan.of("interleaved", 2, costs, virtual=3).held_by(r) for r in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [Plan.of("zbv", 3, costs).held_by(r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert Plan.of("1f1b", 2, costs, counts=[3, 5]).layers == (range(3), range(3, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "1f1b", "virtual": 2}, r"mesh.pp_virtual=2: mesh.pp_schedule=1f1b has one stage a rank"),
        ({"schedule": "interleaved", "virtual": 1}, r"mesh.pp_virtual=1: .* two stages a rank or more"),
        ({"schedule": "zbv", "virtual": 3}, r"mesh.pp_virtual=3: mesh.pp_schedule=zbv has two stages a rank"),
        ({"schedule": "1f1b", "counts": [3, 4]}, r"mesh.pp_layers=\[3, 4\]: give 2 numbers .* model's 8 layers"),
        ({"schedule": "1f1b", "counts": [8]}, r"mesh.pp_layers=\[8\]: give 2 numbers"),
        ({"schedule": "1f1b", "counts": [9, -1]}, r"mesh.pp_layers=\[9, -1\]"),
    ],
)
def test_plans_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.of(ranks=2, costs=[1.0] * 8, **arguments)


def test_weight_gradients_wait_until_they_are_asked_for() -> None:
    layer = torch.nn.Linear(3, 2).double()
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    layer(layer(x)[..., :1].expand(1, 4, 3)).square().sum().backward()  # the weight is used twice on one path
    expected = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = layer.weight.grad = layer.bias.grad = None
    deferred = WeightGradients(layer)
    layer(layer(x)[..., :1].expand(1, 4, 3)).square().sum().backward()
    assert layer.weight.grad is None and torch.allclose(x.grad, expected[0])
    run = deferred.take()
    assert deferred.waiting == [] and layer.weight.grad is None
    run()
    assert torch.allclose(layer.weight.grad, expected[1]) and torch.allclose(layer.bias.grad, expected[2])
    run()  # each product is done once
    assert torch.allclose(layer.weight.grad, expected[1])
    x.grad = layer.weight.grad = layer.bias.grad = None
    checkpoint(lambda: layer(layer(x)[..., :1].expand(1, 4, 3)), use_reentrant=False).square().sum().backward()
    deferred.take()()
    assert torch.allclose(layer.weight.grad, expected[1]) and torch.allclose(x.grad, expected[0])
    layer.compile()
    with pytest.raises(ValueError, match="compiled blocks"):
        WeightGradients(layer)


def test_too_few_micro_batches_are_refused_with_the_field_to_change() -> None:
    with pytest.raises(
        ValueError, match=r"mesh.pp=4, mesh.pp_schedule=1f1b: at least 4 .* there are 3; lower train.micro"
    ):
        Plan.of("1f1b", 4, [1.0] * 8).check(3)
    with pytest.raises(ValueError, match=r"mesh.pp_schedule=interleaved: 5 micro-batches .* 4 or 6 could"):
        Plan.of("interleaved", 2, [1.0] * 8).check(5)
    Plan.of("interleaved", 2, [1.0] * 8).check(3)
    Plan.of("zbv", 4, [1.0] * 8).check(1)
    case = Case(*QWEN, "1f1b", (2, 2), 2)
    for text in run_ranks(refused, 2, case, 1, (24,)):
        assert "at least 2 micro-batches" in text
    for text in run_ranks(refused, 2, case, 2, (24, 23)):
        assert text == "micro-batches of [23, 24] tokens: a pipeline needs them all of one length"
