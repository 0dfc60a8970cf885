"""Which library multiplies fp32 matrices on a CPU.

torch gives them to its BLAS, which in its wheels for x86 is MKL. On AMD's processors MKL keeps to 256-bit vectors and reaches
well under half of what those with 512-bit units can do; oneDNN, which torch uses for bf16, has no such reserve. torch can be
told to hand fp32 products to oneDNN only by permitting it to round their factors to bf16, which oneDNN does where the
processor has matrix tiles (AMX) and nowhere else: so this is asked for on processors without, and the answer is checked.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

Library = Literal["auto", "blas", "onednn"]
CPUINFO = Path("/proc/cpuinfo")
FP32_ERROR = 1e-5  # of the largest entry; factors rounded to bf16 make about 3e-3


def choose(library: Library) -> str:
    """Have this process multiply fp32 matrices by "blas" or "onednn"; returns which.

    auto: oneDNN on AMD's processors with 512-bit vectors, where it gives fp32's accuracy; the BLAS everywhere else.
    Raises ValueError when "onednn" is asked for and cannot be had in fp32's accuracy.
    """
    objection = why_not_onednn()
    if library == "onednn" and objection is not None:
        raise ValueError(f"oneDNN cannot multiply fp32 matrices here: {objection}; leave this to auto, or ask for blas")
    wanted = objection is None and (library == "onednn" or (library == "auto" and _blas_is_narrow()))
    _permit(wanted)
    return "onednn" if wanted else "blas"


@functools.cache
def why_not_onednn() -> str | None:
    """Why fp32 products of this process cannot go through oneDNN, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without it"
    if torch.cpu._is_amx_tile_supported():
        return "on processors with matrix tiles (AMX) it would round factors to bf16"
    with kept():
        _permit(True)
        error = _error()
    return None if error < FP32_ERROR else f"a product was wrong by {error:.0e} of its largest entry"


def in_use() -> str:
    """What `choose` last said in this process; "blas" before."""
    return "onednn" if torch.get_float32_matmul_precision() == "medium" and why_not_onednn() is None else "blas"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is chosen in this context ends with it."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def using(library: Library) -> Iterator[None]:
    """`choose`, for this context."""
    with kept():
        choose(library)
        yield


def _permit(onednn: bool) -> None:
    # The newer torch.backends.mkldnn.matmul.fp32_precision would leave torch.get_float32_matmul_precision() raising errors.
    torch.set_float32_matmul_precision("medium" if onednn else "highest")


def _error() -> float:
    """Largest error of products in the layouts of a linear layer's forward and backward passes."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(96, 160, generator=generator) for _ in range(2))
    errors = []
    for x, y in (
        (a, b.t()),
        (a.t(), b),
        (a, b.t().contiguous()),
        (a[None].expand(4, -1, -1), b.t()[None].expand(4, -1, -1)),
    ):
        exact = x.double() @ y.double()
        errors.append(((x @ y).double() - exact).abs().max() / exact.abs().max())
    return max(error.item() for error in errors)


def _blas_is_narrow() -> bool:
    """True for MKL on AMD's processors with 512-bit vectors."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
    )


@functools.cache
def _vendor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
