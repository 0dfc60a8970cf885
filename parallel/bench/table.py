"""The printed table, in the columns of nccl-tests, one line a size as soon as it is measured.

With one place: size, count, type, redop, root, then time, algbw, busbw, #wrong as there, and further percentiles, which a narrow
terminal leaves out. With both places, all of nccl-tests' thirteen columns and no others, so that what reads those reads these.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.bench.overlap import Beside
from parallel.bench.rows import Row

TYPES = {"fp32": "float", "fp64": "double", "fp16": "half", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Column:
    """rank: which go first where there is no room for all: the highest."""

    head: str
    unit: str
    width: int
    rank: int = 0


HEAD = (
    Column("size", "(B)", 12),
    Column("count", "(elements)", 12, 4),
    Column("type", "", 8, 3),
    Column("redop", "", 6, 6),
    Column("root", "", 5, 6),
)
TIME = (Column("time", "(us)", 9), Column("algbw", "(GB/s)", 7), Column("busbw", "(GB/s)", 7), Column("#wrong", "", 7))
MORE = (
    Column("p50", "(us)", 9, 2),
    Column("p95", "(us)", 9, 5),
    Column("p99", "(us)", 9, 1),
    Column("+-%", "", 6, 7),
    Column("iters", "", 6, 8),
)
CEILING = Column("%ceil", "", 6)
MEASURED = (
    Column("size", "(B)", 12),
    Column("alone", "(us)", 10),
    Column("beside", "(us)", 10),
    Column("slower", "", 7),
    Column("alone", "(us)", 10),
    Column("beside", "(us)", 10),
    Column("slower", "", 7),
    Column("hidden", "", 7),
)


def width() -> int:
    """Columns of the terminal; a pipe or a file has no end."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size((200, 24)).columns
    return 200


class Table:
    """Lines of one section: a group shape, an op, a dtype.

    both: columns for both places. places: those that are measured (in place: True); none for the barrier. room: columns of the
    terminal. ceiling: GB/s of busbw, for a column of its own.
    """

    def __init__(self, both: bool, places: Sequence[bool], room: int, ceiling: float | None = None):
        self.both = both
        self.places = tuple(places)
        self.ceiling = ceiling
        columns = [*HEAD, *TIME, *TIME] if self.both else [*HEAD, *TIME, *MORE]
        if ceiling is not None:
            columns.append(CEILING)
        self.shown = columns if self.both else _fitting(columns, room)
        self._held: Row | None = None

    def head(self) -> list[str]:
        lead = sum(column.width + 1 for column in self.shown if column in HEAD)
        block = sum(column.width + 1 for column in TIME)
        names = ["out-of-place", "in-place"]
        if not self.both:
            names = names[self.places[0] : self.places[0] + 1] if self.places else [""]
        over = "#" + " " * lead + "".join(name.center(block) for name in names)
        lines = [over, "#" + _line([c.head for c in self.shown], self.shown)]
        return [line.rstrip() for line in (*lines, "#" + _line([c.unit for c in self.shown], self.shown))]

    def line(self, row: Row) -> str | None:
        """The line of a row; None for the first of two places, which waits for the second."""
        if self.both and not row.in_place and True in self.places:
            self._held = row
            return None
        held, self._held = self._held, None
        return self._cells(held, row) if self.both and row.in_place else self._cells(row, None)

    def rest(self) -> str | None:
        """The line of a first place whose second was never measured, after an interruption."""
        held, self._held = self._held, None
        return None if held is None else self._cells(held, None)

    def _cells(self, first: Row | None, second: Row | None) -> str:
        """first: the out-of-place row, or the only one; second: the in-place one beside it."""
        row = first or second
        assert row is not None
        cells = [str(row.bytes), str(row.count), TYPES.get(row.dtype, row.dtype) if row.bytes else "none"]
        cells += [row.redop or "none", "-1" if row.root is None else str(row.root), *_timed(first)]
        if self.both:
            cells += _timed(second)
        else:
            cells += [number(value) for value in (row.p50, row.p95, row.p99)]
            cells += ["-" if row.error is None else f"{100 * row.error:.1f}", str(row.iterations)]
        cells += self._share(second or row)
        columns = [*HEAD, *TIME, *(TIME if self.both else MORE), *([CEILING] if self.ceiling is not None else [])]
        if not self.both:
            cells = [cell for cell, column in zip(cells, columns) if column in self.shown]
        return " " + _line(cells, self.shown).rstrip()

    def _share(self, row: Row) -> list[str]:
        if self.ceiling is None:
            return []
        return ["-" if row.busbw is None else f"{100 * row.busbw / self.ceiling:.1f}"]


def beside_head(record: Beside) -> list[str]:
    block = sum(column.width + 1 for column in MEASURED[1:4])
    m, n, k = record.matmul
    names = "collective".center(block) + f"matmul {m}x{n}x{k} {record.matmul_dtype}".center(block)
    lines = [" " * (MEASURED[0].width + 1) + names]
    lines += [_line([c.head for c in MEASURED], MEASURED), _line([c.unit for c in MEASURED], MEASURED)]
    return [("#" + line).rstrip() for line in lines]


def beside_line(record: Beside) -> str:
    def slower(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    cells = [
        str(record.bytes),
        number(record.collective_alone),
        number(record.collective_beside),
        slower(record.collective_slowdown),
        number(record.matmul_alone),
        number(record.matmul_beside),
        slower(record.matmul_slowdown),
        "-" if record.hidden is None else f"{100 * record.hidden:.0f}%",
    ]
    return " " + _line(cells, MEASURED)


def number(value: float | None) -> str:
    """Four significant digits, as nccl-tests writes times and bandwidths; fewer below 0.1."""
    if value is None:
        return "N/A"
    if value < 1:
        return f"{value:.4f}" if value >= 0.1 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.2g}"
    digits = next((digits for digits, limit in ((3, 10), (2, 100), (1, 1000)) if value < limit), 0)
    return f"{value:.{digits}f}"


def _timed(row: Row | None) -> list[str]:
    if row is None:
        return ["N/A"] * len(TIME)
    return [
        number(row.microseconds),
        number(row.algbw),
        number(row.busbw),
        "N/A" if row.wrong is None else str(row.wrong),
    ]


def _fitting(columns: Sequence[Column], room: int) -> list[Column]:
    shown = list(columns)
    while sum(column.width + 1 for column in shown) + 1 > room and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    return shown


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    return " ".join(cell.rjust(column.width) for cell, column in zip(cells, columns))
