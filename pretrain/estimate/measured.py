"""What a chip was measured to do: the `measured:` section of a hardware file, written by `python -m kernels.bench hardware`."""

from __future__ import annotations

import datetime
import math
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from parallel.config import Strict

Layout = Literal["nn", "nt", "tn"]
Product = tuple[PositiveInt, PositiveInt, PositiveInt, str, Layout, PositiveFloat]
NEAREST = 4  # rows that an estimate for a shape in between draws on


class Measured(Strict):
    """Ceilings of one device: streaming rates of its memory and rates of matrix products."""

    date: datetime.date
    device: str
    """The device's full name, or the processor's."""
    threads: int | None = Field(default=None, gt=0)
    """Threads that torch used; None for a GPU."""
    torch: str
    commit: str | None = None
    memory_gbs: dict[Literal["copy", "mul", "add", "triad", "dot"], PositiveFloat] = Field(default_factory=dict)
    """GB/s (1e9 bytes) past the caches, with BabelStream's byte counts."""
    matmul_tflops: dict[str, PositiveFloat] = Field(default_factory=dict)
    """TFLOP/s of the fastest shape, by dtype: bf16, fp16, fp32, tf32, fp8."""
    plateau_gflop: dict[str, PositiveFloat] = Field(default_factory=dict)
    """By dtype, the smallest work 2MNK, in GFLOP, at which a product reached 90 % of that ceiling."""
    matmul: list[Product] = Field(default_factory=list)
    """[m, n, k, dtype, layout, TFLOP/s], layouts as in kernels.benching.hardware.matmul."""

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of the fastest product of this dtype; None where none was measured."""
        found = self.matmul_tflops.get(dtype)
        return None if found is None else 1e12 * found

    def bandwidth(self) -> float | None:
        """Bytes/s of a kernel that reads two arrays and writes one (triad), or the fastest pattern without it."""
        found = self.memory_gbs.get("triad") or max(self.memory_gbs.values(), default=None)
        return None if found is None else 1e9 * found

    def rate(self, m: int, n: int, k: int, dtype: str, layout: Layout | None = None) -> float | None:
        """FLOP/s to expect of an [m, k] x [k, n] product: a mean over the nearest measured shapes.

        Distances are between logarithms of sizes, weights fall with their square, and a measured shape is its own answer.
        Outside of the measured sizes it is the edge's rate, which is too much for products far smaller than the smallest.

        layout: None for the mean over the layouts, as forward and both gradients take turns. Returns the ceiling where no
        rows of the dtype are there, and None where that is not there either.
        """
        rows = [row for row in self.matmul if row[3] == dtype and layout in (None, row[4])]
        shapes: dict[tuple[int, int, int], list[float]] = {}
        for row in rows:
            shapes.setdefault(row[:3], []).append(row[5])
        if not shapes:
            return self.peak(dtype)
        wanted = (m, n, k)
        near = sorted(
            (sum(math.log2(a / b) ** 2 for a, b in zip(wanted, shape)), len(rates) / sum(1 / rate for rate in rates))
            for shape, rates in shapes.items()
        )[:NEAREST]
        if near[0][0] == 0.0:
            return 1e12 * near[0][1]
        # Times add up, not rates: so the mean is harmonic, over layouts and over neighbours.
        weights = [1 / distance for distance, _ in near]
        return 1e12 * sum(weights) / sum(weight / rate for weight, (_, rate) in zip(weights, near))
