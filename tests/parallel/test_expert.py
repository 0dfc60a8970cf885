"""Expert parallelism against the same layers on one rank: outputs, every gradient, and the balancing biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.parallel import expert_ranks
from tests.parallel.expert_ranks import Case, E, Inputs, hidden_part, on_one_rank
from tests.ranks import run_ranks


def cut(expected: list[Tensor], holder: int, holders: int, hidden: int = 0, hiddens: int = 1) -> list[Tensor]:
    """One rank's share of what one rank alone computes."""
    y, tokens, gate_up, down, scores = expected
    own = slice(holder * E // holders, (holder + 1) * E // holders)
    weights: Any = Inputs(y, gate_up[own], down[own], y, y, y)
    part = hidden_part(weights, hidden, hiddens)
    return [y, tokens, part.gate_up, part.down, scores]


UNEVEN = {2: (5, 3), 4: (5, 1, 7, 2)}
EMPTY = {2: (0, 4), 4: (0, 6, 0, 1)}


@pytest.mark.parametrize("world", [2, 4])
def test_dispatch_is_one_rank_cut_by_experts(world: int) -> None:
    cases = [
        *(Case(UNEVEN[world], k) for k in (1, 2, 3)),
        Case(UNEVEN[world], 2, used=2),  # all choices on the first rank
        *(Case(EMPTY[world], k) for k in (1, 2)),  # ranks without tokens
        Case((0,) * world, 2),  # no tokens anywhere
    ]
    results = run_ranks(expert_ranks.dispatched, world, cases, "ep")
    for number, case in enumerate(cases):
        for rank, expected in enumerate(on_one_rank(case)):
            for got, wanted in zip(results[rank][number], cut(expected, rank, world), strict=True):
                assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("world", "kind"), [(2, "tp"), (4, "both")])
def test_dispatch_is_one_rank_cut_by_hidden_width(world: int, kind: str) -> None:
    cases = [Case(UNEVEN[world], 2), Case((4,) * world, 3), Case(EMPTY[world], 1), Case((0,) * world, 2)]
    results = run_ranks(expert_ranks.dispatched, world, cases, kind)
    for number, case in enumerate(cases):
        for rank, expected in enumerate(on_one_rank(case)):
            share = (0, 1, rank, world) if kind == "tp" else (rank // 2, world // 2, rank % 2, 2)
            for got, wanted in zip(results[rank][number], cut(expected, *share), strict=True):
                assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ep", "tp"])
def test_dispatch_in_bf16(kind: str) -> None:
    case = Case((50, 30), 2, dtype=torch.bfloat16)
    results = run_ranks(expert_ranks.dispatched, 2, [case], kind)
    for rank, expected in enumerate(on_one_rank(case)):
        share = (0, 1, rank, 2) if kind == "tp" else (rank, 2)
        for got, wanted in zip(results[rank][0], cut(expected, *share), strict=True):
            assert got.dtype == wanted.dtype and got.isfinite().all()
            # Two roundings of 2^-8 apart, on numbers of the size of the largest.
            assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()
