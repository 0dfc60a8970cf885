"""Who orthogonalises which matrix: one rank each, the work even, and which pieces travel for it.

Ranks hold blocks of whole parameters, however they were cut (tensor, expert) and sharded (FSDP2); some blocks have copies on
several ranks. All ranks of a group know all blocks and come to the same assignment, each by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pretrain.optim.matrices import Matrix

Span = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a block, in a whole parameter or in a matrix of it."""


class Task(NamedTuple):
    """One matrix: the place of its parameter in the list, its own blocks on each rank, and the work it makes.

    pieces: by rank, those of its blocks that lie in the matrix, as spans of the matrix.
    """

    part: int
    matrix: Matrix
    pieces: dict[int, tuple[Span, ...]]
    cost: float


class Assigned(NamedTuple):
    """owner: the rank that orthogonalises it. cells: (who sends it, span) without overlap, the whole matrix. round: when."""

    task: Task
    owner: int
    cells: tuple[tuple[int, Span], ...]
    round: int


def tasks(
    matrices: Sequence[Sequence[Matrix]], held: Sequence[Sequence[Sequence[Span]]], cost: Callable[[int, int], float]
) -> list[Task]:
    """matrices: of each parameter. held: of each rank, of each parameter, the blocks of the whole one that it holds."""
    found, known = [], {}
    for part, each in enumerate(matrices):
        blocks = tuple(tuple(rank[part]) for rank in held)
        key = (tuple(each), blocks)  # layers alike are held alike
        if key not in known:
            known[key] = [
                {rank: own for rank, spans in enumerate(blocks) if (own := _within(matrix, spans))} for matrix in each
            ]
        for matrix, pieces in zip(each, known[key]):
            found.append(Task(part, matrix, pieces, cost(matrix.outputs, matrix.inputs)))
    return found


def _within(matrix: Matrix, spans: Sequence[Span]) -> tuple[Span, ...]:
    """The parts of the spans that lie in the matrix, with offsets from its first entry."""
    found = []
    for offsets, sizes in spans:
        low = [max(a, b) for a, b in zip(offsets, matrix.offsets)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, matrix.offsets, matrix.sizes)]
        if all(a < b for a, b in zip(low, high)):
            start = tuple(a - b for a, b in zip(low, matrix.offsets))
            found.append((start, tuple(b - a for a, b in zip(low, high))))
    return tuple(found)


def assign(tasks: Sequence[Task], ranks: int, bucket: int) -> list[Assigned]:
    """Shares out the matrices among the ranks that hold some of them, so that the largest share is small.

    bucket: elements that an owner takes in one round, at least. Order and rounds are those of the list.
    """
    loads = [0.0] * ranks
    owners = [0] * len(tasks)
    # Those with the least choice first, then the dearest: each to the rank that has least so far.
    for index in sorted(range(len(tasks)), key=lambda index: (len(tasks[index].pieces), -tasks[index].cost)):
        owners[index] = min(tasks[index].pieces, key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += tasks[index].cost
    taken = [0] * ranks
    covers: dict[tuple[tuple[int, tuple[Span, ...]], ...], list[tuple[Span, list[int]]]] = {}
    found = []
    for task, owner in zip(tasks, owners):
        key = tuple(sorted(task.pieces.items()))
        if key not in covers:
            covers[key] = _cover(task)
        cells = tuple((min(holders, key=lambda rank: (abs(rank - owner), rank)), span) for span, holders in covers[key])
        found.append(Assigned(task, owner, cells, taken[owner] // bucket))
        taken[owner] += task.matrix.outputs * task.matrix.inputs
    return found


def _cover(task: Task) -> list[tuple[Span, list[int]]]:
    """The matrix cut along every border of a piece: (span, the ranks that hold it)."""
    every = [(rank, span) for rank, spans in task.pieces.items() for span in spans]
    borders = [
        sorted({edge for _, (start, sizes) in every for edge in (start[dim], start[dim] + sizes[dim])})
        for dim in range(len(task.matrix.sizes))
    ]
    places = [{edge: index for index, edge in enumerate(edges)} for edges in borders]
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, (start, sizes) in every:
        ranges = [range(place[a], place[a + n]) for place, a, n in zip(places, start, sizes)]
        for cell in itertools.product(*ranges):
            holders.setdefault(cell, []).append(rank)
    cells = []
    for cell in sorted(holders):
        start = tuple(edges[index] for edges, index in zip(borders, cell))
        sizes = tuple(edges[index + 1] - edges[index] for edges, index in zip(borders, cell))
        cells.append(((start, sizes), sorted(set(holders[cell]))))
    held = sum(_size(span) for span, _ in cells)
    assert held == _size((task.matrix.offsets, task.matrix.sizes)), "the ranks of the group hold the whole matrix"
    return cells


def _size(span: Span) -> int:
    size = 1
    for length in span[1]:
        size *= length
    return size
