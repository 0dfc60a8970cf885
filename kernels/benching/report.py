"""Tables and JSON of the benchmark, and the line that says under which conditions they arose."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from kernels.architecture import processor
from kernels.benching.measure import Measurement
from kernels.benching.workloads import Shape

HEADINGS = ("workload", "shape", "dtype", "mode", "contender", "ms", "±", "times ours", "peak MB", "difference", "note")


def machine(device: torch.device) -> dict[str, Any]:
    """Where and under which load this runs."""
    load = os.getloadavg()
    return {
        "machine": platform.node(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in load],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(["python -m kernels.bench", *sys.argv[1:]]),
    }


def describe(conditions: dict[str, Any]) -> str:
    where = conditions["device"] if conditions["device"] != "cpu" else conditions["processor"]
    load = ", ".join(f"{value:g}" for value in conditions["load"])
    library = f" (fp32 products: {conditions['fp32_products']})" if "fp32_products" in conditions else ""
    threads = f"{conditions['threads']} threads of {conditions['cores']} cores"
    return (
        f"{conditions['machine']}: {where}{library}, {threads}, load {load}; "
        f"torch {conditions['torch']}, triton {conditions['triton']}, commit {conditions['commit']}"
    )


def commit() -> str:
    """The checkout's commit, with a + when files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def row(m: Measurement) -> tuple[str, ...]:
    head = (m.workload, m.shape, m.dtype, m.mode, m.contender)
    if m.timing is None:
        return (*head, "-", "-", "-", "-", "-", m.note)
    return (
        *head,
        f"{m.timing.median * 1000:.3f}",
        f"{100 * m.timing.spread:.0f}%",
        "-" if m.ratio is None else f"{m.ratio:.2f}",
        "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:.1f}",
        "-" if m.difference is None else f"{m.difference:.1e}",
        m.note,
    )


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> None:
    """Drawn by rich on a terminal where it is installed, otherwise aligned plain text."""
    if out.isatty() and _rich(headings, rows, out):
        return
    lines = [tuple(headings), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), file=out, flush=True)


def _rich(headings: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(*headings, header_style="bold")
    for cells in rows:
        table.add_row(*cells)
    Console(file=out).print(table)
    return True


def linearity(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Rows (workload, mode, contender, lengths, ratio of times, ratio of lengths) for shapes that differ in T alone."""
    groups: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for m in measurements:
        if m.timing is None:
            continue
        shape = Shape.parse(m.shape)
        rest = (m.workload, m.mode, m.contender, m.dtype, str((shape.B, shape.H, shape.K, shape.V)))
        groups.setdefault(rest, []).append((shape.T, m.timing.median))
    rows: list[tuple[str, ...]] = []
    for (workload, mode, contender, *_), points in groups.items():
        points.sort()
        (short, fast), (long, slow) = points[0], points[-1]
        if long > short:
            cells = (f"T {long} over {short}", f"{slow / fast:.2f}", f"{long / short:.2f}")
            rows.append((workload, mode, contender, *cells))
    return rows


LINEARITY_HEADINGS = ("workload", "mode", "contender", "lengths", "times", "proportional would be")


def as_json(conditions: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    return {"conditions": conditions, "measurements": [m.as_dict() for m in measurements]}
