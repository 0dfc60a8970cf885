"""Tensor parallelism against one rank: every family, every gradient, every update."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.parallel.tensor_ranks import NAMES, VARIANTS, assemble, run_split, run_whole
from tests.ranks import run_ranks

# On four ranks, where heads are copied and parts are smallest, these; the others in a campaign.
ON_FOUR = tuple(name for number, name in enumerate(NAMES) if name in VARIANTS or number % 3 == 0)
OTHERS = tuple(name for name in NAMES if name not in ON_FOUR)
CASES = [
    *(pytest.param(name, 2, tuple(NAMES), id=f"{name}-2") for name in NAMES),
    *(pytest.param(name, 4, ON_FOUR, id=f"{name}-4") for name in ON_FOUR),
    *(pytest.param(name, 4, OTHERS, id=f"{name}-4", marks=pytest.mark.campaign) for name in OTHERS),
]


@cache
def split(tp: int, names: tuple[str, ...]) -> list[dict[str, dict[str, Any]]]:
    """Each rank's results: many families in one go, for processes take longer to start than these models to run."""
    return run_ranks(run_split, tp, list(names), timeout=300)


@cache
def whole(name: str) -> dict[str, Any]:
    return run_whole(name)


@pytest.mark.parametrize(("name", "tp", "together"), CASES)
def test_computes_what_one_rank_computes(name: str, tp: int, together: tuple[str, ...]) -> None:
    ranks, one = [rank[name] for rank in split(tp, together)], whole(name)
    for step in range(2):
        assert sum(rank["loss"][step] for rank in ranks) == pytest.approx(one["loss"][step], rel=1e-10), step
        for rank in ranks:
            assert rank["norm"][step] == ranks[0]["norm"][step] == pytest.approx(one["norm"][step], rel=1e-8)
            for router, load in one["load"][step].items():
                assert torch.equal(rank["load"][step][router], load), router
        close([rank["gradient"][step] for rank in ranks], one["gradient"][step], 1e-8)
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], one["logits"], rtol=1e-5, atol=1e-5)  # fp32
        assert torch.equal(rank["last"], rank["logits"][:, -1:])
    close([rank["state"] for rank in ranks], one["state"], 1e-7)


def close(ranks: list[Any], one: Any, tolerance: float) -> None:
    """Largest difference of each tensor, relative to its largest number."""
    found, expected = assemble(ranks), assemble([one])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = expected[name].abs().max().item()
        difference = (tensor - expected[name]).abs().max().item() if tensor.numel() else 0.0
        assert difference <= tolerance * scale + 1e-12, f"{name}: {difference:.3g} of {scale:.3g}"
