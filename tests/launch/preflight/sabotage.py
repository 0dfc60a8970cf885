"""Runs a probe with faults in it:   python sabotage.py FAULT... -- PROBE [argument ...]

It stands where Python stands in Node.python, so that a probe runs as it is, on a machine that is not well.
"""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time


def wrong_bits() -> None:
    """A product in which one bit of one number is wrong, always the same."""
    import torch

    product = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = product(a, b)
        kind = torch.int16 if c.element_size() == 2 else torch.int32
        c.view(kind)[3, 5] ^= 1 << 6 if kind == torch.int16 else 1 << 22
        return c

    torch.mm = mm


def fickle_bits() -> None:
    """A product that is right for whole numbers, and now and then wrong in the last bit for others."""
    import torch

    product, calls = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = product(a, b)
        calls.append(1)
        if len(calls) == 5:
            c.view(torch.int16)[0, 0] ^= 1
        return c

    torch.mm = mm


def not_finite() -> None:
    import torch

    product = torch.mm
    torch.mm = lambda a, b: (
        product(a, b).index_fill_(0, torch.tensor([1]), float("inf")) if a[0, 0] % 1 else product(a, b)
    )


def stuck_bit() -> None:
    """A bit of one word that stays at 1."""
    import torch

    fill = torch.Tensor.fill_

    def fill_(self: torch.Tensor, value: int) -> torch.Tensor:
        fill(self, value)
        if self.dtype == torch.int64:
            self[1000] |= 1 << 13
        return self

    torch.Tensor.fill_ = fill_


def crossed_lines() -> None:
    """Two addresses that reach one cell: what is written to the one is read from the other."""
    import torch

    copy = torch.Tensor.copy_

    def copy_(self: torch.Tensor, *args: object) -> torch.Tensor:
        copy(self, *args)
        if self.dtype == torch.int64 and len(self) > 100:
            self[7] = self[77]
        return self

    torch.Tensor.copy_ = copy_


def hangs_in_matmul() -> None:
    """Not torch itself, which takes seconds to start, but what little of it a probe needs until it hangs."""
    from types import ModuleType
    from unittest.mock import MagicMock

    torch = ModuleType("torch")
    torch.__getattr__ = lambda name: MagicMock()
    torch.get_num_threads = lambda: 1
    torch.Generator = lambda: time.sleep(1000)
    sys.modules["torch"] = torch


def slow_disk() -> None:
    os.fsync = lambda descriptor: time.sleep(0.12)


def hopeless_disk() -> None:
    times = iter([1.05] * 3)
    real = time.perf_counter
    ahead = [0.0]

    def fsync(descriptor: int) -> None:
        ahead[0] += next(times, 1.05)

    os.fsync = fsync
    time.perf_counter = lambda: real() + ahead[0]


def full_disk() -> None:
    def pwrite(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = pwrite


def read_only_disk() -> None:
    def open_(*args: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.open = open_


def hanging_disk() -> None:
    os.fsync = lambda descriptor: time.sleep(1000)


def hanging_folder() -> None:
    os.path.isdir = lambda path: time.sleep(1000)


def no_room() -> None:
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 1000  # f_bavail
        return os.statvfs_result(found)

    os.statvfs = statvfs


if __name__ == "__main__":
    arguments = sys.argv[1:]
    cut = arguments.index("--")
    disk = any(word in ("-c",) or word.endswith("disk.py") for word in arguments[cut + 1 :])
    for fault in arguments[:cut]:
        if ("disk" in fault or fault in ("hanging_folder", "no_room")) == disk:
            globals()[fault]()
    script, *sys.argv[1:] = arguments[cut + 1 :]
    if script == "-c":
        code = sys.argv.pop(1)
        sys.argv[0] = "-c"
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[0] = script
        runpy.run_path(script, run_name="__main__")
