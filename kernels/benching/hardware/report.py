"""What was measured, as tables for people and as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from kernels.benching.hardware.bandwidth import ARRAYS, BEYOND, Stream
from kernels.benching.hardware.matmul import Product, Size
from kernels.benching.hardware.plateau import SHARE, Ceiling
from kernels.benching.hardware.plot import heat
from kernels.benching.report import print_table

Row = tuple[str, ...]


def memory(streams: Sequence[Stream], found: Mapping[str, float], cache: int, out: TextIO) -> None:
    """GB/s by array size, and the ceilings below."""
    if not streams:
        return
    sizes = sorted({s.array_bytes for s in streams})
    table = {(s.array_bytes, s.op): _gbs(s) for s in streams}
    rows = [(_bytes(size), *(table.get((size, op), "-") for op in ARRAYS)) for size in sizes]
    past = f"memory (arrays from {_bytes(BEYOND * cache)})" if max(sizes) >= BEYOND * cache else "largest array"
    rows.append((past, *(f"{found[op]:.1f}" if op in found else "-" for op in ARRAYS)))
    print(f"\nMemory bandwidth, GB/s, by the size of one array (the largest cache has {_bytes(cache)})", file=out)
    print_table(("array", *ARRAYS), rows, out)
    for s in streams:
        if s.wrong:
            print(f"WRONG: {s.wrong} (arrays of {_bytes(s.array_bytes)})", file=out)


def _gbs(s: Stream) -> str:
    return "WRONG" if s.wrong else f"{s.gbs:.1f}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def matmul(
    products: Sequence[Product],
    found: Mapping[str, Ceiling],
    asked: Sequence[Size],
    layouts: Sequence[str],
    out: TextIO,
) -> None:
    """Heat maps in figures, shapes that were asked for, what did not run, and the ceilings last."""
    for dtype in found:
        for k, cells in heat(products, dtype).items():
            ms, ns = sorted({m for m, _ in cells}), sorted({n for _, n in cells})
            print(f"\nMatrix products, TFLOP/s: {dtype}, K = {k}, the best of its layouts; M down, N across", file=out)
            rows = [(str(m), *(_rate(cells.get((m, n))) for n in ns)) for m in ms]
            print_table(("", *map(str, ns)), rows, out)
    if asked:
        print("\nShapes asked for, TFLOP/s and share of the dtype's ceiling", file=out)
        print_table(("M x N x K", "GFLOP", "dtype", *layouts), _asked(products, found, asked, layouts), out)
    notes = [(f"{'x'.join(map(str, row.size))}", row.dtype, row.layout, row.note) for row in products if row.note]
    if notes:
        print("\nWithout a figure", file=out)
        print_table(("M x N x K", "dtype", "layout", "why"), notes, out)
    if found:
        print(f"\nCeilings, TFLOP/s, and GFLOP of a product (2MNK) from which on {SHARE:.0%} is reached", file=out)
        rows = [_ceiling(c, layouts) for c in found.values()]
        print_table(("dtype", "ceiling", *layouts, "at M x N x K", "± %", "first from", "half of all from"), rows, out)


def _rate(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _asked(
    products: Sequence[Product], found: Mapping[str, Ceiling], asked: Sequence[Size], layouts: Sequence[str]
) -> list[Row]:
    rows = []
    for dtype, ceiling in found.items():
        for size in asked:
            best: dict[str, float] = {}
            for row in products:
                if row.valid and row.dtype == dtype and row.size == size:
                    best[row.layout] = max(best.get(row.layout, 0.0), row.tflops)
            m, n, k = size
            cells = (f"{_rate(best[x])} ({best[x] / ceiling.tflops:.0%})" if x in best else "-" for x in layouts)
            rows.append((f"{m}x{n}x{k}", f"{2e-9 * m * n * k:.3g}", dtype, *cells))
    return rows


def _ceiling(c: Ceiling, layouts: Sequence[str]) -> Row:
    best = c.best
    assert best.timing is not None
    rates = (_rate(c.layouts.get(layout)) for layout in layouts)
    where = f"{'x'.join(map(str, best.size))} {best.layout}" + ("" if best.library == "default" else f" {best.library}")
    usual = "never" if c.usual_gflop is None else f"{c.usual_gflop:.3g}"
    return (c.dtype, _rate(c.tflops), *rates, where, f"{100 * best.timing.spread:.1f}", f"{c.first_gflop:.3g}", usual)


def as_json(
    conditions: Mapping[str, Any],
    streams: Sequence[Stream],
    bandwidth: Mapping[str, float],
    cache: int,
    products: Sequence[Product],
    found: Mapping[str, Ceiling],
    *,
    complete: bool,
) -> dict[str, Any]:
    """Rates are medians; GB/s of 1e9 bytes, TFLOP/s of 1e12; seconds are all samples."""
    return {
        "conditions": dict(conditions),
        "complete": complete,
        "memory": {
            "cache_bytes": cache,
            "ceilings_gbs": dict(bandwidth),
            "rows": [
                {
                    "op": s.op,
                    "array_bytes": s.array_bytes,
                    "gbs": s.gbs,
                    "spread": s.timing.spread,
                    "seconds": list(s.timing.samples),
                    "wrong": s.wrong or None,
                }
                for s in streams
            ],
        },
        "matmul": {
            "ceilings": {dtype: _ceiling_json(c) for dtype, c in found.items()},
            "rows": [_product_json(row) for row in products],
        },
    }


def _ceiling_json(c: Ceiling) -> dict[str, Any]:
    return {
        "tflops": c.tflops,
        "shape": list(c.best.size),
        "layout": c.best.layout,
        "library": c.best.library,
        "layouts": c.layouts,
        "plateau_share": SHARE,
        "plateau_gflop": c.first_gflop,
        "plateau_shape": list(c.first.size),
        "usual_gflop": c.usual_gflop,
    }


def _product_json(row: Product) -> dict[str, Any]:
    values = {name: value for name, value in vars(row).items() if name != "timing"}
    values["note"] = row.note or None
    values["gflop"] = row.work / 1e9
    if row.timing is not None:
        values |= {
            "tflops": row.tflops,
            "seconds": list(row.timing.samples),
            "median_seconds": statistics.median(row.timing.samples),
            "spread": row.timing.spread,
        }
    return values
