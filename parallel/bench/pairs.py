"""Command-line: `torchrun --nproc-per-node N -m parallel.bench pairs`: every link between two ranks, and who is slow."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

from parallel.bench.interrupt import Stop
from parallel.bench.sizes import parse_sizes, show, span
from parallel.ending import end
from parallel.fabric.fit import Fit, fit
from parallel.fabric.links import Finding, Matrix
from parallel.fabric.pairwise import pairwise, places
from parallel.processes import Processes, join, leave

WIDEST = 16  # ranks whose matrix is printed
SIZES = {"cpu": "8,4K,64K,256K,1M", "cuda": "8,64K,1M,16M,64M"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m parallel.bench pairs",
        description="Measures latency and bandwidth between every two ranks, each way, and a piece of work on every rank; names "
        "nodes, ranks and links that are slower than their like. Start it with torchrun on all nodes in question.",
    )
    made.add_argument(
        "--sizes", help="bytes, the smallest for latency, e.g. 8,64K,1M or 1K:16M; three or more are fitted"
    )
    made.add_argument(
        "--tolerance", type=float, default=1.25, help="a link is slow from so many times the time of its like"
    )
    made.add_argument("--seconds", type=float, default=0.2, help="time for each pair, about (default 0.2)")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--apart", action="store_true", help="one pair at a time (default on CPUs)")
    how.add_argument(
        "--together", action="store_true", help="every rank in one pair, all pairs at a time (default on GPUs)"
    )
    made.add_argument("--node-size", type=int, metavar="N", help="ranks of a node, if it is not as the launcher says")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--timeout", type=float, default=600.0, help="seconds a rank waits for the others (default 600)")
    made.add_argument("--strict", action="store_true", help="exit with 1 if anything is slow")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured and found")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured (with --strict 1 if anything is slow), 2 bad usage, 128 + signal if it was told to stop."""
    try:
        options = parser().parse_args(arguments)
        given = parse_sizes(options.sizes) if options.sizes is not None else None
        if not options.tolerance > 1:
            raise ValueError(f"--tolerance {options.tolerance:g}: should be above 1, such as 1.25")
        if not 0 < options.seconds < math.inf:
            raise ValueError(f"--seconds {options.seconds:g}: should be above 0, such as 0.2")
        processes = join(options.device, options.timeout)
    except ValueError as error:
        return _usage(str(error))
    try:
        return _run(options, given, processes)
    finally:
        leave()


def _run(options: argparse.Namespace, given: list[int] | None, processes: Processes) -> int:
    sizes = given or parse_sizes(SIZES[processes.device.type])
    if processes.world < 2:
        return _usage("a pair has two ranks, and this job has one: torchrun --nproc-per-node N -m parallel.bench pairs")
    try:
        where = places(processes, options.node_size)
    except ValueError as error:
        return _usage(f"--node-size: {error}")
    apart = options.apart or (processes.device.type == "cpu" and not options.together)
    progress = _Progress(processes.first)
    with Stop() as stop:
        matrix, complete = pairwise(
            processes,
            sizes,
            where=where,
            apart=apart,
            seconds=options.seconds,
            tolerance=options.tolerance,
            stop=lambda: bool(stop.number),
            progress=progress,
        )
    progress.clear()
    findings = matrix.findings(options.tolerance)
    if processes.first:
        fits = fit(matrix.rows())
        report(matrix, fits, findings, complete, sys.stdout)
        if options.json is not None:
            options.json.write_text(json.dumps(as_json(matrix, fits, findings, complete)) + "\n")
            print(f"written: {options.json}")
    if not complete:
        return 128 + (stop.number or 2)
    return 1 if findings and options.strict else 0


def report(matrix: Matrix, fits: Sequence[Fit], findings: Sequence[Finding], complete: bool, out: TextIO) -> None:
    """For people: matrices of few ranks, a summary of many, and what is slow."""
    count = len(matrix.places)
    nodes = len({place.node for place in matrix.places})
    measured = int((~np.isnan(matrix.latency)).sum()) // 2
    where = f"{count} ranks on {nodes} node{'s' * (nodes > 1)}"
    print(f"# {where}, {measured} of {count * (count - 1) // 2} pairs, {span(matrix.sizes)}", file=out)
    fitted = {each.group: each for each in fits}
    if count <= WIDEST:
        _table("latency, us (row sends, column receives)", 1e6 * matrix.latency, out)
        if len(matrix.sizes) > 1:
            _table(f"bandwidth up to {show(matrix.sizes[-1])}, GB/s", matrix.bandwidth, out)
    else:
        print(f"latency    {_quartiles(1e6 * matrix.latency)} us", file=out)
        print(f"bandwidth  {_quartiles(matrix.bandwidth)} GB/s", file=out)
    if fitted and count <= 4:
        print("\nlink      alpha, us           bandwidth, GB/s", file=out)
        for link, each in fitted.items():
            print(
                f"{link:<9} {_plus(each.alpha_us, each.alpha_error_us):<19} {_plus(each.busbw_gbs, each.busbw_error_gbs)}",
                file=out,
            )
    print(file=out)
    if count == 2:
        print("two ranks: only the two directions of one link can be compared", file=out)
    for finding in findings:
        print(finding.text(matrix.places), file=out)
    if not findings and measured:
        print("no rank and no link is slower than its like", file=out)
    if not complete:
        print("stopped before the end: these are the results so far", file=out)
    out.flush()


def _table(title: str, values: Any, out: TextIO) -> None:
    names = [str(rank) for rank in range(len(values))]
    cells = [["-" if math.isnan(value) else f"{value:.3g}" for value in row] for row in values]
    width = max(map(len, [*names, *(cell for row in cells for cell in row)])) + 2
    print(f"\n{title}\n{'':4}" + "".join(name.rjust(width) for name in names), file=out)
    for name, row in zip(names, cells):
        print(name.rjust(4) + "".join(cell.rjust(width) for cell in row), file=out)


def _quartiles(values: Any) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return "not measured"
    low, lower, middle, upper, high = np.percentile(known, (0, 25, 50, 75, 100))
    return f"median {middle:.4g}, half of the links {lower:.4g} to {upper:.4g}, all {low:.4g} to {high:.4g}"


def _plus(value: float | None, error: float | None) -> str:
    if value is None:
        return "not seen"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def as_json(matrix: Matrix, fits: Sequence[Fit], findings: Sequence[Finding], complete: bool) -> dict[str, Any]:
    """Everything; times in microseconds, one way, [size][sender][receiver], null where not measured."""
    return {
        "convention": "nccl-tests",
        "op": "send_recv",
        "places": [vars(place) for place in matrix.places],
        "sizes": matrix.sizes,
        "microseconds": _nulls(1e6 * matrix.seconds),
        "bandwidth_gbs": _nulls(matrix.bandwidth),
        "compute_microseconds": _nulls(1e6 * matrix.compute),
        "fits": [vars(each) for each in fits],
        "findings": [{**vars(each), "text": each.text(matrix.places)} for each in findings],
        "complete": complete,
    }


def _nulls(values: Any) -> Any:
    if isinstance(values, float):
        return None if math.isnan(values) else float(f"{values:.6g}")
    return [_nulls(each) for each in (values.tolist() if isinstance(values, np.ndarray) else values)]


class _Progress:
    """One line on a terminal that is written over; nothing elsewhere."""

    def __init__(self, first: bool):
        self.on = first and sys.stderr.isatty()

    def __call__(self, done: int, all: int) -> None:
        if self.on:
            print(f"\rround {done + 1} of {all}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _usage(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # one line, not one from every rank
        print(f"pairs: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    end(main)
