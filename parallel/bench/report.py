"""What rank 0 prints and writes while a run goes on and when it ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel.bench import files, fits, machine, plot, table
from parallel.bench.groups import Shape
from parallel.bench.interrupt import Stop
from parallel.bench.overlap import Beside
from parallel.bench.rows import Row
from parallel.bench.sweep import Bench, Task
from parallel.processes import Processes

SAVE_SECONDS = 2.0  # how old the files may get: what a rank that is killed leaves behind


@dataclass
class Report:
    """What rank 0 prints and writes; on the other ranks, nothing."""

    options: argparse.Namespace
    processes: Processes
    stop: Stop
    machine: dict[str, Any]
    shapes: list[Shape]
    ceilings: dict[str, dict[str, float]]
    rows: list[Row] = field(default_factory=list)
    overlaps: list[Beside] = field(default_factory=list)
    stopped: str | None = None
    _table: table.Table | None = None
    _heads: bool = False
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._say(f"# {machine.line(self.machine)}")
        if self.machine["backend"] == "gloo" and len(self.machine["hosts"]) == 1 and self.processes.world > 1:
            self._say("# gloo on one host: the speed of its memory and sockets, not of a network")

    def begin(self, task: Task) -> None:
        shape, operation = task.team.shape, task.operation
        count = self.processes.world // shape.size
        also = f" (also {', '.join(shape.also)})" if shape.also else ""
        many = f"{count} groups of {shape.size} ranks" if count > 1 else f"{shape.size} rank{'s' * (shape.size > 1)}"
        if count > 1:
            far = f", {shape.stride} apart" if shape.stride > 1 and shape.size > 1 else ""
            many += far + (", only the first works" if self.options.one_group else ", all at once")
        dtype = f" of {task.dtype}" if len(self.options.dtypes) > 1 and operation.moves else ""
        self._say(f"#\n# {operation.name}{dtype} over {shape.name}{also}: {many}")
        self._table = table.Table(
            both=self.options.place == "both",
            places=task.places if operation.moves else (),
            room=table.width(),
            ceiling=self.ceilings[shape.name].get(operation.name),
        )
        self._heads = True
        if self.options.overlap is None:
            self._say(*self._table.head())

    def row(self, row: Row) -> None:
        self.rows.append(row)
        assert self._table is not None
        line = self._table.line(row)
        if line is not None:
            self._say(line)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save(complete=False)

    def beside(self, row: Row, record: Beside) -> None:
        self.rows.append(row)
        self.overlaps.append(record)
        if self._heads:
            self._say(*table.beside_head(record))
            self._heads = False
        self._say(table.beside_line(record))

    def end(self) -> None:
        """Of a section; also of one that was broken off."""
        rest = self._table.rest() if self._table is not None else None
        if rest is not None:
            self._say(rest)
        self._table = None

    def finish(self, bench: Bench, complete: bool) -> None:
        self.end()
        if not self.processes.first:
            return
        curves = fits.curves(self.rows)
        self._say("#", *_footer(self.rows, bench, self.options.place == "both"))
        if self.stopped:
            self._say(f"# stopped by {self.stopped}: these are the results so far")
        self._say(*fits.lines(curves, fits.conclusion(curves) if curves else None))
        self.save(complete)
        options = self.options
        if options.plot is not None and not plot.draw(self.rows, options.plot, machine.line(self.machine)):
            options.plot = None
        written = [str(path) for path in (options.json, options.csv, options.plot) if path is not None]
        if written:
            self._say(f"# written: {', '.join(written)}")

    def save(self, complete: bool) -> None:
        """Writes the files as far as things are, so that even a killed run has left something."""
        self._saved = time.monotonic()
        if not self.processes.first:
            return
        if self.options.json is not None:
            curves = fits.curves(self.rows)
            found = fits.conclusion(curves) if curves else None
            groups = [{"name": s.name, "ranks": s.size, "stride": s.stride, "also": list(s.also)} for s in self.shapes]
            text = files.to_json(
                self.machine,
                groups,
                self.rows,
                [record.as_json() for record in self.overlaps],
                [curve.as_json() for curve in curves],
                asdict(found) if found else None,
                complete,
            )
            files.replace(self.options.json, text)
        if self.options.csv is not None:
            files.replace(self.options.csv, files.to_csv(self.rows))

    def _say(self, *lines: str) -> None:
        if not (self.processes.first and lines):
            return
        try:
            print(*lines, sep="\n", flush=True)
        except BrokenPipeError:  # `| head` has seen enough: all ranks stop, as at a Ctrl-C
            self.stop.number = self.stop.number or signal.SIGPIPE
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process lives)


def _footer(rows: Sequence[Row], bench: Bench, both: bool) -> list[str]:
    """nccl-tests' two last lines, and what else should not be overlooked."""
    lines = []
    checked = [row.wrong for row in rows if row.wrong is not None]
    if checked:
        total = sum(checked)
        lines.append(f"# Out of bounds values : {total} {'FAILED' if total else 'OK'}")
    speeds = [row.busbw for row in rows if row.busbw is not None]
    if speeds:
        lines.append(f"# Avg bus bandwidth    : {table.number(sum(speeds) / len(speeds))}")
    lines += [f"# WRONG: {fault}" for fault in bench.faults[:10]]
    if len(bench.faults) > 10:
        lines.append(f"# WRONG: and {len(bench.faults) - 10} more")
    target = bench.plan.confidence
    loose = [row for row in rows if bench.plan.iterations is None and (row.error is None or row.error > target)]
    if loose:
        lines.append(
            f"# {len(loose)} of {len(rows)} rows did not come within +-{100 * target:g}% of their mean in {bench.plan.most} "
            f"iterations or {bench.plan.seconds:g} s: see {'error in --json' if both else '+-%'}, and p50 for what is usual"
        )
    return lines + [f"# {note}" for note in bench.notes]
