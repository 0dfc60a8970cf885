"""Collectives against the same sums and cuts made in one process, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from parallel import collectives
from tests.parallel import collective_ranks
from tests.parallel.collective_ranks import part
from tests.ranks import run_ranks


@pytest.mark.parametrize(("world", "dim"), [(2, 0), (2, 1), (3, -1)])
def test_all_gather_joins_and_its_gradient_is_the_sum_of_what_the_ranks_ask(world: int, dim: int) -> None:
    shape = (2, 3, 4)
    results = run_ranks(collective_ranks.through, world, "all_gather", shape, dim)
    whole = torch.cat([part(rank, shape) for rank in range(world)], dim)
    asked = sum(part(100 + rank, tuple(whole.shape)) for rank in range(world))
    for (y, gradient), wanted in zip(results, asked.chunk(world, dim)):
        assert torch.equal(y, whole)
        assert_close(gradient, wanted)


@pytest.mark.parametrize(("world", "dim"), [(2, 1), (3, -2)])
def test_reduce_scatter_is_a_part_of_the_sum_and_its_gradient_the_whole(world: int, dim: int) -> None:
    shape = (2, 6, 4)
    results = run_ranks(collective_ranks.through, world, "reduce_scatter", shape, dim)
    parts = sum(part(rank, shape) for rank in range(world)).chunk(world, dim)
    asked = torch.cat([part(100 + rank, tuple(parts[0].shape)) for rank in range(world)], dim)
    for (y, gradient), wanted in zip(results, parts):
        assert_close(y, wanted)
        assert torch.equal(gradient, asked)


def test_all_reduce_sums_forward_and_copy_sums_backward() -> None:
    shape, world = (3, 2), 3
    summed = run_ranks(collective_ranks.through, world, "all_reduce", shape, None)
    for rank, (y, gradient) in enumerate(summed):
        assert_close(y, sum(part(other, shape) for other in range(world)))
        assert torch.equal(gradient, part(100 + rank, shape))
    copied = run_ranks(collective_ranks.through, world, "copy", shape, None)
    for rank, (y, gradient) in enumerate(copied):
        assert torch.equal(y, part(rank, shape))
        assert_close(gradient, sum(part(100 + other, shape) for other in range(world)))


def test_all_to_all_moves_rows_and_moves_their_gradients_back() -> None:
    counts = [[1, 0, 2], [3, 1, 0], [0, 0, 0]]
    results = run_ranks(collective_ranks.swapped, 3, counts)
    sent = [part(rank, (sum(row), 2)).split(row) for rank, row in enumerate(counts)]
    for rank, (y, _) in enumerate(results):
        assert torch.equal(y, torch.cat([sent[other][rank] for other in range(3)]))
    asked = [part(100 + r, (sum(row[r] for row in counts), 2)).split([row[r] for row in counts]) for r in range(3)]
    for rank, (_, gradient) in enumerate(results):
        assert torch.equal(gradient, torch.cat([asked[other][rank] for other in range(3)]))


def test_a_gathered_tensor_that_one_rank_does_not_use_stops_nobody() -> None:
    first, second, third = run_ranks(collective_ranks.used_by_one, 3, timeout=20)
    assert first.tolist() == [[1.0, 2.0]] and second.tolist() == [[3.0, 4.0]] and third.tolist() == [[5.0, 6.0]]


def test_every_dtype_travels() -> None:
    first, second = run_ranks(collective_ranks.every_dtype, 2)
    for gathered, scattered, summed, exchanged in first.values():
        assert gathered.tolist() == [[0, 10], [1, 11], [2, 12], [3, 13]]
        assert scattered.tolist() == [[10], [12]] and summed.tolist() == [[10], [12], [14], [16]]
        assert exchanged.tolist() == [[0], [10]]
    for _, scattered, _, exchanged in second.values():
        assert scattered.tolist() == [[14], [16]] and exchanged.tolist() == [[1], [2], [3], [11], [12], [13]]


def test_refusals_name_the_sizes() -> None:
    for texts in run_ranks(collective_ranks.refusals, 2):
        assert texts == [
            "dim 0 of (3, 2) cannot be cut into 2 equal parts; choose a multiple of 2",
            "send_counts add up to 2, but x has 3 rows",
        ]


def test_without_a_group_nothing_happens() -> None:
    x = torch.randn(2, 2)
    for y in (
        collectives.all_gather(x, 0, None),
        collectives.reduce_scatter(x, 0, None),
        collectives.all_reduce(x, None),
        collectives.copy(x, None),
        collectives.all_to_all(x, [2], [2], None),
        *collectives.beside(x, x, None),
    ):
        assert y is x
