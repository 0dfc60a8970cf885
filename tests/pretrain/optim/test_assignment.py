"""Who orthogonalises which matrix: every element once, the work even, copies not sent twice."""

from __future__ import annotations

import itertools

import torch

from pretrain.optim.assignment import Span, assign, tasks
from pretrain.optim.matrices import Matrix


def whole(rows: int, columns: int) -> Matrix:
    return Matrix((0, 0), (rows, columns), rows, columns)


def cost(m: int, n: int) -> float:
    return float(m * m * n)


def check_covered(found: list) -> None:
    """Each element of each matrix comes from exactly one rank, which holds it."""
    for one in found:
        marks = torch.zeros(one.task.matrix.sizes)
        for holder, (start, sizes) in one.cells:
            block = tuple(slice(a, a + n) for a, n in zip(start, sizes))
            marks[block] += 1
            assert any(
                all(b <= a and a + n <= b + m for a, n, b, m in zip(start, sizes, low, size))
                for low, size in one.task.pieces[holder]
            )
        assert (marks == 1).all()


def test_row_shards_with_an_uneven_last_one() -> None:
    held: list[list[list[Span]]] = [[[((low, 0), (min(3, 7 - low), 5))]] if low < 7 else [[]] for low in (0, 3, 6, 9)]
    found = assign(tasks([[Matrix((0, 0), (4, 5), 4, 5), Matrix((4, 0), (3, 5), 3, 5)]], held, cost), 4, 1)
    check_covered(found)
    assert set(found[0].task.pieces) == {0, 1}
    assert found[1].task.pieces == {1: (((0, 0), (2, 5)),), 2: (((2, 0), (1, 5)),)}
    assert found[0].owner in (0, 1) and found[1].owner in (1, 2)
    assert found[0].owner != found[1].owner


def test_blocks_that_overlap_are_sent_once() -> None:
    """Two ranks hold rows 0-3 and 2-5, a third all of them: cut at every border."""
    held: list[list[list[Span]]] = [[[((0, 0), (4, 2))]], [[((2, 0), (4, 2))]], [[((0, 0), (6, 2))]]]
    (one,) = assign(tasks([[whole(6, 2)]], held, cost), 3, 1)
    check_covered([one])
    assert [span for _, span in one.cells] == [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((4, 0), (2, 2))]


def test_the_owner_of_a_copy_sends_to_nobody_but_itself() -> None:
    """Replicas: all ranks hold everything, so nothing needs to travel before the work."""
    held: list[list[list[Span]]] = [[[((0, 0), (4, 4))]] * 8 for _ in range(4)]
    found = assign(tasks([[whole(4, 4)]] * 8, held, cost), 4, 1)
    assert all(holder == one.owner for one in found for holder, _ in one.cells)
    assert sorted(one.owner for one in found) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_work_is_even_and_those_with_little_choice_come_first() -> None:
    """Experts lie on two ranks each, dense matrices on all four: the dense ones fill what the experts leave."""
    full: list[Span] = [((0, 0), (8, 8))]
    parts = [*((0, 1) for _ in range(5)), *((2, 3) for _ in range(2)), *((0, 1, 2, 3) for _ in range(5))]
    held = [[full if rank in ranks else [] for ranks in parts] for rank in range(4)]
    found = assign(tasks([[whole(8, 8)]] * len(parts), held, cost), 4, 1)
    loads = [sum(one.task.cost for one in found if one.owner == rank) / cost(8, 8) for rank in range(4)]
    assert loads == [3, 3, 3, 3]
    assert all(one.owner in parts[index] for index, one in enumerate(found))


def test_rounds_fill_up() -> None:
    held: list[list[list[Span]]] = [[[((0, 0), (4, 4))]] * 6]
    found = assign(tasks([[whole(4, 4)]] * 6, held, cost), 1, 32)
    assert [one.round for one in found] == [0, 0, 1, 1, 2, 2]


def test_alike_layers_are_cut_alike_and_in_two_dims() -> None:
    """Cut over columns by two ranks, each of which is sharded by rows over two more."""
    held: list[list[list[Span]]] = [
        [[((row, column), (2, 3))], [((row, column), (2, 3))]] for row, column in itertools.product((0, 2), (0, 3))
    ]
    found = assign(tasks([[whole(4, 6)]] * 2, held, cost), 4, 1)
    check_covered(found)
    assert len(found[0].cells) == 4
    assert found[0].owner != found[1].owner
