"""A row cut over ranks against the same row on one: every mixer, with documents that begin anywhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import delta_rule, gated_linear_attention, selective_scan
from parallel.context import Cut, apply_context, check_context, ring, shard, unshard
from parallel.context.recurrences import law_of
from pretrain.model.ffns.union_of_experts import UnionOfExpertsConfig
from tests.parallel import context_ranks
from tests.parallel.context_ranks import ROWS, AllRanks, T, attended_alone, measure, model_of, row_of
from tests.pretrain.families import FAMILIES, MIXERS
from tests.ranks import run_ranks

WHOLE = {"mixer smha", "mixer smha_threshold", "ffn union_threshold", "Union of Experts"}
MIXER_FAMILIES = [f"mixer {name}" for name in MIXERS if f"mixer {name}" not in WHOLE]
OTHERS = ["ffn moe", "ffn moe_softmax", "ffn zaya_moe", "ffn union_of_experts", "ffn hourglass", "multi-token", "ZAYA1"]
RUNS: list[tuple[int, list[str], list[str]]] = [  # ranks, families, rows
    (2, [*MIXER_FAMILIES, *OTHERS], ["many documents"]),
    (3, ["mixer cca", "mixer kda", "multi-token"], list(ROWS)),
    (4, MIXER_FAMILIES, ["one document"]),
    (4, ["mixer wide_attention", "mixer gated_delta_net", "mixer mamba", "ZAYA1"], ["many documents"]),
]
CASES = [(run, family) for run in range(len(RUNS)) for family in RUNS[run][1]]


@cache
def on_ranks(run: int) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    world, families, rows = RUNS[run]
    return run_ranks(context_ranks.on_ranks, world, families, rows, torch.float64)


@cache
def alone(family: str, row: str) -> dict[str, Tensor]:
    return measure(model_of(family, torch.float64), *row_of(row))


@pytest.mark.parametrize(("run", "family"), CASES, ids=[f"{RUNS[run][0]} ranks, {family}" for run, family in CASES])
def test_logits_loss_and_every_gradient_are_those_of_one_rank(run: int, family: str) -> None:
    for row in RUNS[run][2]:
        parts = [result[family, row] for result in on_ranks(run)]
        expected = alone(family, row)
        assert parts[0].keys() == expected.keys()
        assert_close(
            unshard([part["logits"] for part in parts]), expected["logits"], rtol=1e-6, atol=1e-6
        )  # they are fp32
        for name, value in expected.items():
            if name != "logits":
                scale = value.abs().max().item()
                assert scale > 0, name
                difference = (parts[0][name] - value).abs().max().item()
                assert difference <= 1e-9 * scale, f"{row}, {name}: {difference:.1e} of {scale:.1e}"


def test_every_family_is_cut_or_refused() -> None:
    for family in FAMILIES:
        model = model_of(family, torch.float32)
        if family in WHOLE:
            with pytest.raises(ValueError, match=r"mesh.cp=2: blocks\.0\..* needs whole sequences: .*; use mesh.cp=1"):
                check_context(model, 2)
        else:
            check_context(model, 2, T)
        check_context(model, 1)


def test_bf16_autocast_costs_no_more_accuracy_than_on_one_rank() -> None:
    families = ["mixer conv_attention", "mixer cca", "mixer gated_delta_net", "mixer mamba", "mixer mamba2"]
    results = run_ranks(context_ranks.in_bf16, 2, families)
    for family in families:
        exact = alone(family, "many documents")
        with torch.autocast("cpu", torch.bfloat16):
            one = measure(model_of(family, torch.float32), *row_of("many documents"))
        two = dict(results[0][family]) | {"logits": unshard([result[family]["logits"] for result in results])}
        errors = []
        for measured in (one, two):
            gradients = [name for name in exact if name not in ("logits", "loss")]
            squares = [((measured[name] - exact[name]).norm() / exact[name].norm()).square() for name in gradients]
            logits = (measured["logits"] - exact["logits"]).norm() / exact["logits"].norm()
            errors.append((torch.stack(squares).mean().sqrt().item(), logits.item()))
        print(family, errors)
        for mine, allowed in zip(errors[1], errors[0]):
            assert mine <= 1.3 * allowed, f"{family}: {mine:.1e}, on one rank {allowed:.1e}"


# Attention


@pytest.mark.parametrize("world", [2, 4])
def test_attention_by_either_exchange_and_any_window(world: int) -> None:
    rows, windows = list(ROWS), [None, 1, 2, 6, 7, 13, 30]  # chunks are of 12 and 6 tokens
    results = run_ranks(context_ranks.attended, world, rows, windows)
    for name in rows:
        for window in windows:
            expected = attended_alone(name, window)
            for exchange in ("gather", "ring"):
                parts = [result[name, exchange, window] for result in results]
                for what, one, *pieces in zip("oqkv", expected, *parts):
                    where = f"{name}, {exchange}, window {window}, {what}"
                    difference = (unshard(pieces) - one).abs().max().item()
                    assert difference <= 1e-12, f"{where}: {difference:.1e}"


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("window", [None, 3, 9])
def test_the_tiles_of_a_ring_are_what_queries_see(window: int | None, rows: int) -> None:
    borders = ROWS["many documents"]
    assert borders is not None
    token = torch.arange(T)
    document = torch.bucketize(token, torch.tensor(borders[1:-1]), right=True)
    sees = (token[:, None] >= token) & (document[:, None] == document)
    if window is not None:
        sees &= token[:, None] - token < window
    for ranks in (1, 2, 4):
        found = torch.zeros(T, T, dtype=torch.int64)
        for rank in range(ranks):
            cut = Cut.of(ranks, rank, T, torch.tensor(borders))
            for source in range(ranks):
                keys = Cut.of(ranks, source, T, None).tokens()
                first_of: dict[int, int] = {}
                for tile in ring.tiles(cut, source, window, rows):
                    i, j = cut.tokens()[tile.queries], keys[tile.keys]
                    assert i[0] == tile.first_query and j[0] == tile.first_key
                    part = sees[i[:, None], j]
                    assert part.any() and tile.masked == (not part.all())
                    found[i[:, None], j] += 1
                    if source == rank and tile.first_query not in first_of:
                        first_of[tile.first_query] = 1
                        assert part.any(dim=1).all()  # else there would be nothing to merge the next block into
        assert torch.equal(found[sees], torch.ones(int(sees.sum()), dtype=torch.int64))
        assert found.max() == 1


# Recurrences


def recurrence(name: str) -> tuple[Any, list[Tensor | None], dict[str, Any]]:
    """An operator, its inputs for 11 tokens of one row, and its options."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(1, 11, 1, 3), draw(1, 11, 1, 3), draw(1, 11, 2, 4)
    gates = {"none": None, "head": -draw(1, 11, 2).exp(), "channel": -draw(1, 11, 2, 3).exp()}
    operator, _, gate = name.partition(" ")
    if operator == "delta":
        return delta_rule, [q, k, v, draw(1, 11, 2).sigmoid(), gates[gate]], {"normalize_qk": True}
    if operator == "additive":
        return gated_linear_attention, [q, k, v, gates[gate]], {"scale": 0.5}
    return (
        selective_scan,
        [draw(1, 11, 3), draw(1, 11, 3).exp(), -draw(3, 2).exp(), draw(1, 11, 2), draw(1, 11, 2), draw(3)],
        {},
    )


@pytest.mark.parametrize(
    "name", [f"{op} {gate}" for op in ("delta", "additive") for gate in ("none", "head", "channel")] + ["scan"]
)
def test_summaries_of_spans_add_up_to_the_state_after_all(name: str) -> None:
    operator, inputs, options = recurrence(name)
    law = law_of(operator)
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    _, expected = operator(*inputs, output_final_state=True, **options)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True)
    state = None
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        summary = law.summarize([x if x is None or x.dim() < 3 else x[:, begin:end] for x in inputs], options)
        state = summary[0] if state is None else law.advance(state, summary, inputs)
    assert state is not None
    assert_close(state, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((state * weight).sum(), leaves, materialize_grads=True)
    for one, two in zip(got, wanted):
        assert_close(one, two, rtol=1e-10, atol=1e-12)


# The cut


def test_chunks_pair_up_from_both_ends() -> None:
    row = torch.arange(12)[None]
    parts = [shard(row, 3, rank) for rank in range(3)]
    assert [part.tolist() for part in parts] == [[[0, 1, 10, 11]], [[2, 3, 8, 9]], [[4, 5, 6, 7]]]
    assert torch.equal(unshard(parts), row)
    two = torch.randn(5, 8)
    assert torch.equal(unshard([shard(two, 2, rank) for rank in range(2)]), two)
    assert torch.equal(unshard([shard(two.T, 2, rank, dim=0) for rank in range(2)], dim=0), two.T)


def test_every_token_knows_its_place_and_its_document() -> None:
    cuts = [Cut.of(2, rank, 8, torch.tensor([0, 0, 3, 4, 4, 8, 8])) for rank in range(2)]
    assert unshard([cut.positions()[None] for cut in cuts]).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert unshard([cut.owners()[None] for cut in cuts]).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    assert unshard([cut.last()[None] for cut in cuts]).tolist() == [[0, 0, 1, 1, 0, 0, 0, 1]]
    assert cuts[0].pieces == [[(0, 2, 0)], [(6, 8, 4)]] and cuts[1].pieces == [[(2, 3, 0), (3, 4, 3)], [(4, 6, 4)]]
    assert [cut.local().tolist() for cut in cuts] == [[0, 2, 4], [0, 1, 2, 4]]
    assert [cuts[0].place(chunk) for chunk in range(4)] == [0, 2, 3, 1]
    joined = torch.cat([cut.tokens() for cut in cuts]).view(4, 2)  # what gathering in the order of ranks gives
    assert [joined[cuts[0].place(chunk)].tolist() for chunk in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


# Refusals


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    union: dict[str, Any] = {"hidden": 8, "experts": 4, "top_k": 2}
    check_context(UnionOfExpertsConfig(**union).build(8), 2)
    for more, reason in (({"patch": 2}, "patch above 1"), ({"capacity": 3}, "capacity counts the tokens")):
        with pytest.raises(ValueError, match=reason):
            check_context(UnionOfExpertsConfig(**union, **more).build(8), 2)
    with pytest.raises(ValueError, match="prefix"):
        check_context(UnionOfExpertsConfig(**union, expert_select="prefix", kept=3).build(8), 2)
    with pytest.raises(ValueError, match="needs whole sequences"):
        apply_context(model_of("mixer smha", torch.float32), AllRanks(2, 0))
    model = model_of("mixer conv_attention", torch.float32)
    check_context(model, 2, 8)
    with pytest.raises(ValueError, match=r"a row of 10 tokens cannot be cut into 4 equal chunks.*multiple of 4"):
        check_context(model, 2, 10)
    with pytest.raises(ValueError, match=r"looks 2 tokens back.*a row of 4 tokens into chunks of 1.*at least 8 tokens"):
        check_context(model, 2, 4)
    cca = model_of("mixer cca", torch.float32)
    check_context(cca, 2, 8)
    with pytest.raises(ValueError, match="looks 2 tokens back"):
        check_context(cca, 2, 4)  # the halo of both convolutions
    with pytest.raises(ValueError, match="looks 3 tokens back"):
        check_context(model_of("mixer kda", torch.float32), 2, 8)


def test_input_that_does_not_fit_is_refused() -> None:
    for texts in run_ranks(context_ranks.refused, 2):
        starts = (
            "tokens has 2 rows, context parallelism cuts a single packed one",
            "cu_seqlens must rise from 0 to 16",
            "a row of 14 tokens cannot be cut into 4 equal chunks",
            "a convolution looks 2 tokens back, but 2 context-parallel ranks (mesh.cp) cut a row of 4 tokens into chunks of 1",
            "context parallelism is for training",
            "context parallelism is for training",
            "mesh.cp: no context-parallel form of attention",
        )
        assert len(texts) == len(starts)
        for text, start in zip(texts, starts):
            assert text.startswith(start), text
