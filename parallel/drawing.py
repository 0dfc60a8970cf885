"""The process grid as text: one line, or a drawing of rows (pp, dp) and columns (cp, tp) that shows who is neighbour to whom."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.grid import Grid

MOST_ROWS, MOST_COLUMNS = 16, 16  # beyond these, middles are left out


def line(grid: Grid, where: str = "") -> str:
    """`pp 2 x dp 4 x tp 2 = 16 rank(s)`, axes of size one left out. where: added after the ranks (" on cuda")."""
    sizes = [f"{axis} {grid.size(axis)}" for axis in ("pp", "dp", "cp", "tp") if grid.size(axis) > 1] or ["dp 1"]
    if grid.replicate > 1:
        sizes[grid.pp > 1] += f" (replicate {grid.replicate} x shard {grid.shard})"
    text = f"{' x '.join(sizes)} = {grid.world} rank(s){where}"
    if grid.ep > 1 or grid.expert_tensor:
        text += f"; experts: edp {grid.size('edp')} x ep {grid.ep}" + (f" x tp {grid.tp}" if grid.expert_tensor else "")
    return text


def draw(grid: Grid, rank: int = 0, node: int | None = None, where: str = "") -> str:
    """The grid, and the groups of `rank`; one line where there is one axis, and nothing to see.

    node: ranks of one node, if known, to show where nodes end.
    """
    if sum(grid.size(axis) > 1 for axis in ("pp", "replicate", "shard", "cp", "tp", "ep")) < 2:
        return line(grid, where)
    return "\n".join([line(grid, where), *_table(grid, node), *_groups(grid, rank)])


def _table(grid: Grid, node: int | None) -> list[str]:
    crowded = grid.pp * grid.dp > MOST_ROWS
    wide = grid.cp * grid.tp > MOST_COLUMNS
    gap = " | " if grid.tp > 1 else "  "  # between the blocks of cp ranks
    number = len(str(grid.world - 1))  # width of a rank, and of the head above it
    if not wide and grid.cp * grid.tp > 1:
        number = max(number, len(f"tp {grid.tp - 1}" if grid.tp > 1 else f"cp {grid.cp - 1}"))

    def cells(first: int) -> str:
        blocks = []
        for cp in _some(grid.cp, 4 if wide else grid.cp):
            start = first + (cp or 0) * grid.tp
            if cp is None:
                blocks.append("...")
            elif wide:
                blocks.append(_span(range(start, start + grid.tp)).rjust(2 * number + 1))
            else:
                blocks.append("  ".join(str(start + tp).rjust(number) for tp in range(grid.tp)))
        return gap.join(blocks)

    def heads() -> list[str]:
        width = 2 * number + 1 if wide else grid.tp * (number + 2) - 2
        parts = ["..." if cp is None else f"cp {cp}".center(width) for cp in _some(grid.cp, 4 if wide else grid.cp)]
        lines = [gap.join(parts)] if grid.cp > 1 else []
        if grid.tp > 1 and not wide:
            lines.append(gap.join(["  ".join(f"tp {tp}".rjust(number) for tp in range(grid.tp))] * grid.cp))
        return lines

    rows: list[tuple[str, str, str, str]] = [("", "", head, "") for head in heads()]
    for pp in _some(grid.pp, 4 if crowded else grid.pp):
        if pp is None:
            rows.append(("...", "", "", ""))
            continue
        for place, dp in enumerate(_some(grid.dp, 4 if crowded else grid.dp)):
            stage = f"pp {pp}" if grid.pp > 1 and place == 0 else ""
            if dp is None:
                rows.append(("", "...", "", ""))
                continue
            first = (pp * grid.dp + dp) * grid.cp * grid.tp
            last = first + grid.cp * grid.tp - 1
            rows.append((stage, f"dp {dp}" if grid.dp > 1 else "", cells(first), _nodes(first, last, node)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join(["", *(c.ljust(w) for c, w in zip(row, widths) if w), row[3]]).rstrip() for row in rows]


def _groups(grid: Grid, rank: int) -> list[str]:
    axes = ["pp", "dp", *(("replicate", "shard") if grid.replicate > 1 else ()), "cp", "tp"]
    if grid.dp > 1 and grid.cp > 1:
        axes.append("dp_cp")
    if grid.ep > 1 or grid.expert_tensor:
        axes += ["ep", "edp"]
    axes = [axis for axis in axes if grid.size(axis) > 1]
    width = max(map(len, axes))
    places = [f"  {axis.ljust(width)}  {_span(grid.ranks(axis, rank))}" for axis in axes]
    return [f"groups of rank {rank}:", *places]


def _nodes(first: int, last: int, node: int | None) -> str:
    if node is None:
        return ""
    here, there = first // node, last // node
    return f"node {here}" if here == there else f"nodes {here}-{there}"


def _span(ranks: Sequence[int]) -> str:
    """An arithmetic progression of ranks, shortened when long."""
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    if ranks[1] - ranks[0] == 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]} ({len(ranks)} ranks)"


def _some(count: int, most: int) -> list[int | None]:
    """0 .. count-1, the middle replaced by None when there are more than `most`."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]
