"""Replicas that differ in a bit."""

from __future__ import annotations

import pytest
import torch

from parallel.replicas import fingerprint
from tests.parallel import replica_ranks
from tests.ranks import run_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_every_bit_of_every_rank(world: int) -> None:
    everyone = tuple(range(world))
    for covered, missed, found in run_ranks(replica_ranks.every_bit, world):
        assert covered == (12 + 2) / (12 + 2 + 36) and missed == 0
        odd = {(rank,) for rank in everyone} if world > 2 else {everyone}
        assert found == {("model/shared", everyone, one) for one in odd}


def test_blocks_that_only_some_ranks_hold() -> None:
    for found in run_ranks(replica_ranks.only_some, 4):
        assert found == [("model/pairs", [2, 3], [2, 3])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_fingerprints_know_dtypes_and_shapes(dtype: torch.dtype) -> None:
    values = (torch.arange(12).view(3, 4) % 5).to(dtype)
    assert int(fingerprint(values.t())) == int(fingerprint(values.t().contiguous()))
    assert int(fingerprint(values[:, 1:])) == int(fingerprint(values[:, 1:].clone()))
    assert int(fingerprint(values)) != int(fingerprint(values.t().contiguous()))
    assert int(fingerprint(values[0, 0])) == int(fingerprint(values[:1, 0]))
