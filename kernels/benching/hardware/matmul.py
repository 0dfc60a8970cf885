"""Matrix products [m, k] x [k, n] over sizes, dtypes and layouts.

A layout says how each operand lies in memory, row after row (n) or column after column (t). The three of a linear layer with
weight [out, in]: "nt" its forward pass, "nn" the gradient of its input, "tn" that of its weight.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kernels.benching.hardware.clock import Clock
from kernels.benching.hardware.dtypes import Kind, precision
from kernels.benching.measure import relative_difference
from kernels.benching.timing import Timing
from kernels.common import products as fp32_products

LAYOUTS = ("nn", "nt", "tn")
SAMPLED = 16  # rows, and columns, of a result that are checked
LONGEST = 20.0  # seconds; a product that would take longer, at the rate of those before it, is left out
Size = tuple[int, int, int]  # m, n, k

# (M and N, K) by device. From far below the 200 GFLOP that an MI300X needs (2 x 512 x 512 x 1024 is half a GFLOP) to 4400.
SIZES: dict[str, tuple[list[int], list[int]]] = {
    "cpu": ([128, 256, 512, 1024, 2048], [256, 1024, 4096]),
    "cuda": ([512, 1024, 2048, 4096, 8192, 16384], [1024, 4096, 8192]),
}
QUICK: dict[str, tuple[list[int], list[int]]] = {"cpu": ([512, 1024], [1024]), "cuda": ([2048, 8192], [8192])}


@dataclass(frozen=True)
class Product:
    """One shape, dtype, layout and library. timing: None where it did not run; note: why, or what its answer had wrong."""

    m: int
    n: int
    k: int
    dtype: str
    layout: str
    library: str = "default"
    timing: Timing | None = None
    error: float | None = None  # relative root mean square difference from fp64, of a sample
    note: str = ""

    @property
    def size(self) -> Size:
        return self.m, self.n, self.k

    @property
    def work(self) -> float:
        """FLOPs."""
        return 2.0 * self.m * self.n * self.k

    @property
    def valid(self) -> bool:
        return self.timing is not None and not self.note

    @property
    def tflops(self) -> float:
        """TFLOP/s, median."""
        assert self.timing is not None
        return self.work / self.timing.median / 1e12


@dataclass(frozen=True)
class Task:
    kind: Kind
    layout: str
    size: Size
    library: str = "default"


def parse(text: str) -> list[Size]:
    """4096x2048x4096,... as (m, n, k). Raises ValueError for anything else."""
    found = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(\d+)[xX](\d+)[xX](\d+)", part)
        if match is None or "0" in (numbers := [str(int(number)) for number in match.groups()]):
            raise ValueError(
                f"{part!r} is not the shape of a product; write MxNxK, such as 8192x4096x2048, with commas between"
            )
        m, n, k = map(int, numbers)
        found.append((m, n, k))
    if not found:
        raise ValueError("no shape is given; write MxNxK, such as 8192x4096x2048, with commas between")
    return found


def grid(sizes: Iterable[int], depths: Iterable[int]) -> list[Size]:
    """Every m and n of `sizes` with every k of `depths`."""
    return [(m, n, k) for k, m, n in product(sorted(depths), sorted(sizes), sorted(sizes))]


def tasks(
    kinds: Sequence[Kind], layouts: Sequence[str], shapes: Iterable[Size], libraries: Sequence[str]
) -> list[Task]:
    """All that is to be measured. fp8 products exist in one layout: nt.

    By dtype, within it from little work to much: an interrupted run has whole dtypes, and predicts what would take too long.
    """
    ordered = sorted(set(shapes), key=lambda size: (size[0] * size[1] * size[2], size))
    return [
        Task(kind, layout, size, library)
        for kind in kinds
        for size in ordered
        for layout in (("nt",) if kind.scaled else layouts)
        for library in libraries
    ]


def seconds_left(tasks: Sequence[Task], done: Sequence[Product], clock: Clock) -> float:
    """A guess of how long the rest of `tasks` takes, by the best rate of its dtype so far, or of any before that has one."""
    rates: dict[str, float] = {}
    for row in done:
        if row.valid:
            rates[row.dtype] = max(rates.get(row.dtype, 0.0), 1e12 * row.tflops)
    known = min(rates.values(), default=1e12)
    return sum(clock.seconds(2 * math.prod(t.size) / rates.get(t.kind.name, known)) for t in tasks[len(done) :])


def measure(tasks: Sequence[Task], clock: Clock) -> Iterator[Product]:
    """One product a task, in order."""
    operands = _Operands(clock.device)
    fastest: dict[tuple[str, str], float] = {}  # FLOP/s so far
    for task in tasks:
        key = (task.kind.name, task.layout)
        m, n, k = task.size
        row = Product(m, n, k, task.kind.name, task.layout, task.library)
        seconds = row.work / fastest[key] if key in fastest else 0.0
        if seconds > LONGEST:
            yield _noted(row, f"left out: one would take {seconds:.0f} s")
            continue
        try:
            with precision(task.kind), _library(task.library, clock.device):
                timing, error = _one(task, operands, clock)
        except (RuntimeError, ValueError, MemoryError) as problem:  # out of memory, or a size that fp8 does not take
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
            yield _noted(row, f"did not run: {(str(problem).splitlines() or [type(problem).__name__])[0][:140]}")
            continue
        wrong = "" if error <= task.kind.tolerance else f"WRONG: off by {error:.1e} of its size"  # NaN is wrong, too
        found = Product(m, n, k, row.dtype, row.layout, row.library, timing, error, wrong)
        if found.valid:
            fastest[key] = max(fastest.get(key, 0.0), found.work / timing.median)
        yield found


def _noted(row: Product, note: str) -> Product:
    return Product(row.m, row.n, row.k, row.dtype, row.layout, row.library, note=note)


def _one(task: Task, operands: _Operands, clock: Clock) -> tuple[Timing, float]:
    kind = task.kind
    m, n, k = task.size
    a = operands.matrix("a", m, k, kind, transposed=task.layout[0] == "t")
    b = operands.matrix("b", k, n, kind, transposed=task.layout[1] == "t")
    one = torch.ones((), device=clock.device) if kind.scaled else None
    # NaN, so that an element that is never written shows.
    out = None if kind.scaled else torch.full((m, n), float("nan"), dtype=kind.storage, device=clock.device)
    result = kind.multiply(a, b, out, one)
    error = _error(a, b, result)
    return clock.time(lambda: kind.multiply(a, b, out, one)), error


def _error(a: Tensor, b: Tensor, result: Tensor) -> float:
    """Of a sample of rows and columns, the first and the last among them, against fp64 on the CPU."""
    rows, columns = (_sample(count, result.device) for count in result.shape)
    wanted = _exact(a, rows) @ _exact(b.t(), columns).t()
    return relative_difference(result[rows][:, columns].cpu(), wanted)


def _sample(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(SAMPLED, count)).round().long().to(device)


def _exact(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x in fp64 on the CPU. Bytes are moved, as not every operator knows fp8."""
    if x.dtype.itemsize == 1:
        return x.view(torch.uint8)[rows].contiguous().view(x.dtype).cpu().to(torch.float32).double()
    return x[rows].cpu().double()


class _Operands:
    """Random matrices, cut from one store an operand: making them anew for each shape would take longer than multiplying."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stores: dict[tuple[str, torch.dtype], Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, kind: Kind, *, transposed: bool) -> Tensor:
        """[rows, columns]; transposed: column after column."""
        store = self._store(name, kind.storage, rows * columns)[: rows * columns]
        return store.view(columns, rows).t() if transposed else store.view(rows, columns)

    def _store(self, name: str, dtype: torch.dtype, length: int) -> Tensor:
        found = self.stores.get((name, dtype))
        if found is None or found.numel() < length:
            self.stores = {key: store for key, store in self.stores.items() if key[1] == dtype and key[0] != name}
            seed = 1 if name == "a" else 2  # else a square product would be one of a matrix with itself
            generator = torch.Generator(self.device).manual_seed(seed)
            # Up to the next power of two, so that a sweep of growing sizes fills it few times.
            found = torch.empty(1 << (length - 1).bit_length(), dtype=dtype, device=self.device)
            for piece in found.split(1 << 24):
                piece.copy_(torch.randn(piece.numel(), device=self.device, generator=generator))
            self.stores[name, dtype] = found
        return found


@contextlib.contextmanager
def _library(name: str, device: torch.device) -> Iterator[None]:
    """Within this context products come from this library. "default": on GPUs torch's choice, on CPUs that of our runs."""
    if device.type == "cpu":
        with fp32_products.using("auto" if name == "default" else name):  # type: ignore[arg-type]
            yield
    elif name == "default":
        yield
    else:
        preferred = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(name)
        try:
            yield
        finally:
            torch.backends.cuda.preferred_blas_library(preferred)
