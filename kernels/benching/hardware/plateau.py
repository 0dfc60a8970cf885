"""Ceilings of matrix products, and the work from which on they are reached.

The paper of ZAYA1 (2511.17127, section on GEMMs) found that an MI300X needs about 200 GFLOP a product, 2MNK, for its peak. Here:
the smallest work with which a product reached 90 % of the ceiling, and the work from which on half of all products do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.benching.hardware.matmul import Product

SHARE = 0.9


@dataclass(frozen=True)
class Ceiling:
    """Of one dtype. GFLOP are of one product, 2MNK."""

    dtype: str
    best: Product
    first: Product  # the smallest work that reaches SHARE of the ceiling
    usual_gflop: float | None  # from here on the median product reaches it; None if not even the largest do
    layouts: dict[str, float]  # TFLOP/s, the best of each layout

    @property
    def tflops(self) -> float:
        return self.best.tflops

    @property
    def first_gflop(self) -> float:
        return self.first.work / 1e9


def ceilings(products: Sequence[Product]) -> dict[str, Ceiling]:
    """By dtype, of those that have a right answer; in the order in which dtypes were measured."""
    by_dtype: dict[str, list[Product]] = {}
    for row in products:
        if row.valid:
            by_dtype.setdefault(row.dtype, []).append(row)
    return {dtype: _ceiling(dtype, rows) for dtype, rows in by_dtype.items()}


def _ceiling(dtype: str, rows: list[Product]) -> Ceiling:
    best = max(rows, key=lambda row: row.tflops)
    enough = [row for row in rows if row.tflops >= SHARE * best.tflops]
    layouts: dict[str, float] = {}
    for row in rows:
        layouts[row.layout] = max(layouts.get(row.layout, 0.0), row.tflops)
    first = min(enough, key=lambda row: (row.work, -row.tflops))
    return Ceiling(dtype, best, first, usual(rows, SHARE * best.tflops), layouts)


def usual(rows: Sequence[Product], wanted: float) -> float | None:
    """GFLOP from which on the median product reaches `wanted` TFLOP/s, judged for each doubling of the work by itself."""
    octaves: dict[int, list[Product]] = {}
    for row in rows:
        octaves.setdefault(math.floor(math.log2(row.work)), []).append(row)
    found = None
    for octave in sorted(octaves, reverse=True):
        if statistics.median(row.tflops for row in octaves[octave]) < wanted:
            break
        found = min(row.work for row in octaves[octave]) / 1e9
    return found
