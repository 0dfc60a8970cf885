"""The check's results as a table and as JSON."""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch

from kernels.offline.sweep import Result

HEADINGS = (
    "arch",
    "kernel",
    "request",
    "launch",
    "registers",
    "spills",
    "scratch",
    "shared",
    "warps/SIMD",
    "matrix instructions",
    "16-byte loads",
    "verdict",
)


def row(result: Result) -> tuple[str, ...]:
    """One line of the table: figures of one kernel, or what stood in the way of them."""
    verdict = ", ".join(dict.fromkeys(kind for kind, _ in result.problems)) or result.note or "ok"
    figures = result.figures
    kernel = "/".join(part for part in (result.op, result.kernel) if part)
    if figures is None:
        return (result.arch, kernel, result.case, launch(result), *["-"] * 7, verdict)
    agprs = f"+{figures.accumulation_registers}" if figures.accumulation_registers else ""
    return (
        result.arch,
        kernel,
        result.case,
        launch(result),
        f"{figures.registers - figures.accumulation_registers}{agprs}",
        str(figures.spills),
        str(figures.scratch),
        str(figures.shared),
        f"{figures.occupancy:g}",
        ", ".join(f"{count} {_short(name)}" for name, count in sorted(figures.matrix.items())) or "none",
        f"{figures.wide_loads}/{figures.loads}",
        verdict,
    )


def launch(result: Result) -> str:
    """Warps and stages, then the blocks: w8 s2 BLOCK_V=64 (or BV=64)."""
    words = []
    for name, letter in (("num_warps", "w"), ("num_stages", "s")):
        if name in result.options:
            words.append(f"{letter}{result.options[name]}")
    blocks = {name: value for name, value in result.constants.items() if re.fullmatch(r"BLOCK_?\w*|B[A-Z]", name)}
    return " ".join(words + [f"{name}={value}" for name, value in blocks.items()])


def _short(name: str) -> str:
    return name.removeprefix("v_mfma_").removesuffix(".mma_async")


def print_table(results: Sequence[Result], out: TextIO) -> None:
    """All results, coloured by rich on a terminal where it is installed, otherwise aligned plain text."""
    rows = [row(result) for result in results]
    if out.isatty() and _rich(rows, out):
        return
    widths = [max(len(line[i]) for line in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
    for line in [HEADINGS, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), file=out)


def _rich(rows: Sequence[tuple[str, ...]], out: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(*HEADINGS, header_style="bold")
    for cells in rows:
        style = None if cells[-1] == "ok" else "red"
        if cells[-1].startswith(("no Triton", "declined")):
            style = "dim"
        table.add_row(*cells, style=style)
    Console(file=out).print(table)
    return True


def print_problems(results: Sequence[Result], out: TextIO) -> int:
    """A line for each result at fault; returns how many."""
    faulty = [result for result in results if result.problems]
    for result in faulty:
        parts = (result.arch, result.op, result.kernel, result.case, launch(result))
        where = " / ".join(part for part in parts if part)
        # Of a compiler's error, the offending line and the message; all of it is in the JSON.
        sentences = [
            " ... ".join(line.strip() for line in sentence.strip().splitlines()[-3:] if line.strip(" ^"))
            for _, sentence in result.problems
        ]
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in result.problems))
        print(f"FAULT ({kinds}) {where}: {'; '.join(sentences)}", file=out)
    return len(faulty)


def as_json(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Everything that was read, for scripts and for comparing two versions."""
    import triton

    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
        "command": sys.argv,
        "seconds": round(seconds, 1),
        "kernels": sum(result.figures is not None for result in results),
        "faulty": sum(bool(result.problems) for result in results),
        "results": [dataclasses.asdict(result) for result in results],
    }
