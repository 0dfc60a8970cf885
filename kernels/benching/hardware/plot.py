"""A picture of it all: bandwidth against array size, rates against work, and a heat map for each dtype and depth."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.benching.hardware.bandwidth import ARRAYS, Stream
from kernels.benching.hardware.matmul import Product
from kernels.benching.hardware.plateau import SHARE, Ceiling

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises ValueError before anything is measured, if a plot could not be drawn there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed")


def draw(
    path: Path,
    title: str,
    streams: Sequence[Stream],
    products: Sequence[Product],
    found: Mapping[str, Ceiling],
    cache: int,
) -> None:
    """Writes the picture. A row of heat maps a dtype, a column a depth k; the brightest cell of a row is the dtype's ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = {dtype: heat(products, dtype) for dtype in found}
    wide = max([2, *(len(by_depth) for by_depth in maps.values())])
    rows = 1 + len(maps)
    figure, axes = pyplot.subplots(rows, wide, figsize=(4.6 * wide, 3.9 * rows), squeeze=False, layout="constrained")
    figure.suptitle(title)
    for axis in axes.flat:
        axis.set_visible(False)
    _curves(axes[0][0], streams, cache)
    _work(axes[0][1], products, found)
    for line, (dtype, by_depth) in zip(axes[1:], maps.items()):
        for axis, (k, cells) in zip(line, by_depth.items()):
            _heat(axis, f"{dtype}, K = {k}", cells, found[dtype].tflops)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def heat(products: Sequence[Product], dtype: str) -> dict[int, dict[tuple[int, int], float]]:
    """TFLOP/s by k, then (m, n): the best of the layouts. A depth with less than four shapes makes no map."""
    maps: dict[int, dict[tuple[int, int], float]] = {}
    for row in products:
        if row.valid and row.dtype == dtype:
            cells = maps.setdefault(row.k, {})
            cells[row.m, row.n] = max(cells.get((row.m, row.n), 0.0), row.tflops)
    return {k: cells for k, cells in sorted(maps.items()) if len(cells) >= 4}


def _curves(axis: Any, streams: Sequence[Stream], cache: int) -> None:
    if not streams:
        return
    axis.set_visible(True)
    for op in ARRAYS:
        points = [(s.array_bytes, s.gbs) for s in streams if s.op == op and not s.wrong]
        if points:
            axis.plot(*zip(*points), marker="o", markersize=3, label=op)
    axis.axvline(cache, color="grey", linestyle=":", linewidth=1)
    axis.text(cache, 0, " cache", color="grey", fontsize=7, va="bottom")
    axis.set(xscale="log", xlabel="bytes of an array", ylabel="GB/s", title="memory bandwidth")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


def _work(axis: Any, products: Sequence[Product], found: Mapping[str, Ceiling]) -> None:
    if not found:
        return
    axis.set_visible(True)
    for dtype, ceiling in found.items():
        points = [
            (row.work / 1e9, 100 * row.tflops / ceiling.tflops) for row in products if row.valid and row.dtype == dtype
        ]
        axis.scatter(*zip(*points), s=6, label=f"{dtype}: {ceiling.tflops:.3g} TFLOP/s")
    axis.axhline(100 * SHARE, color="grey", linestyle=":", linewidth=1)
    axis.set(
        xscale="log", xlabel="GFLOP of a product (2MNK)", ylabel="% of the dtype's ceiling", title="matrix products"
    )
    axis.set_ylim(0, 105)
    axis.legend(fontsize=7, loc="upper left")


def _heat(axis: Any, title: str, cells: Mapping[tuple[int, int], float], ceiling: float) -> None:
    axis.set_visible(True)
    ms, ns = sorted({m for m, _ in cells}), sorted({n for _, n in cells})
    values = [[cells.get((m, n), float("nan")) for n in ns] for m in ms]
    axis.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=ceiling)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                color = "black" if value > 0.6 * ceiling else "white"
                axis.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(ns)), [str(n) for n in ns], fontsize=7)
    axis.set_yticks(range(len(ms)), [str(m) for m in ms], fontsize=7)
    axis.set(xlabel="N", ylabel="M", title=f"{title}: TFLOP/s")
