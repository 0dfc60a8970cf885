"""Rows as a measurement would give them, with times that are chosen."""

from __future__ import annotations

from kernels.benching.hardware.bandwidth import ARRAYS, Stream
from kernels.benching.hardware.matmul import Product
from kernels.benching.timing import Timing


def product(m: int, n: int, k: int, tflops: float, dtype: str = "bf16", layout: str = "nt", **more: object) -> Product:
    seconds = 2.0 * m * n * k / tflops / 1e12
    return Product(m, n, k, dtype, layout, timing=Timing((seconds,) * 3), error=1e-4, **more)  # type: ignore[arg-type]


def stream(op: str, size: int, gbs: float, wrong: str = "") -> Stream:
    seconds = ARRAYS[op] * size / gbs / 1e9
    return Stream(op, size, Timing((seconds,) * 3), wrong)
