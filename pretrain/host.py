"""How a rank on a CPU uses its host: how many threads, which cores, what becomes of memory that a step frees, and of numbers
too small to matter, and which library multiplies matrices.

The number of threads may change last bits, as everywhere in torch. With a GPU the host's part is small and nothing is touched.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from kernels.common import products
from parallel.config import Strict
from parallel.cores import members

NODES = Path("/sys/devices/system/node")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes no higher one
TOP_PAD = 64 << 20  # bytes by which the heap grows at a time


class CpuConfig(Strict):
    """Only for `train.device: cpu`."""

    threads: int | None = Field(None, ge=1)
    """Threads of a rank. null: OMP_NUM_THREADS where it is set (torchrun sets 1 for several ranks), else the host's cores by its
    ranks."""
    bind: Literal["numa", "cores", "none"] = "numa"
    """numa: on hosts with several memory nodes, each rank stays on the cores of one. cores: each rank has cores of its own."""
    keep_memory: bool = True
    """Memory that a step frees serves the next step, instead of going back to the system to be zeroed again page by page. A
    process then never shrinks. Left alone where MALLOC_* or GLIBC_TUNABLES variables are set."""
    flush_denormals: bool = True
    """Numbers nearer to zero than 1.2e-38, which most processors take many times longer for, count as zero."""
    fp32_products: products.Library = "auto"
    """Which library multiplies fp32 matrices. auto: oneDNN on AMD's processors with 512-bit vectors, of which torch's BLAS (MKL)
    uses half; the BLAS elsewhere. onednn is refused where it would round to bf16."""


def settle(config: CpuConfig, local_rank: int, local_world: int) -> list[str]:
    """Apply it to this process. Returns lines for the user: what is not as fast as it could be.

    local_rank, local_world: this rank among the ranks on its host.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    own = share(config.bind, cores, nodes(), local_rank, local_world)
    if own != cores:
        for thread in Path("/proc/self/task").iterdir():  # those that torch has started already, too
            os.sched_setaffinity(int(thread.name), own)
    told = os.environ.get("OMP_NUM_THREADS", "")
    fair = max(1, len(cores) // local_world)
    threads = config.threads or (None if told else fair)
    settle_process(config)
    if threads is not None:
        torch.set_num_threads(threads)
    if threads is not None and threads > len(own):
        return [f"{threads} threads share {len(own)} core(s): cpu.threads={len(own)} is faster"]
    if config.threads is None and told == "1" and fair > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        return [
            f"1 thread a rank, as OMP_NUM_THREADS says (torchrun sets it): with cpu.threads={fair} all {len(cores)} cores work"
        ]
    return []


def settle_process(config: CpuConfig) -> None:
    """What does not depend on the other ranks of the host: memory, denormal numbers, products. Before threads are started, which
    inherit some of it.

    Raises ValueError when the library of products that is asked for cannot serve.
    """
    if config.flush_denormals:
        for kind in (np.float32, np.float64):
            np.finfo(kind)  # kept by numpy, which would look for denormal numbers later, and warn that there are none
        torch.set_flush_denormal(True)
    products.choose(config.fp32_products)
    if config.keep_memory:
        keep_memory(os.environ)


def share(
    bind: str, cores: Sequence[int], nodes: Sequence[Sequence[int]], local_rank: int, local_world: int
) -> list[int]:
    """The cores that this rank may use, of those that the process was given.

    nodes: the cores of each memory node of the host. Ranks are spread over the nodes in order, so that neighbours share one.
    """
    everything = sorted(cores)
    usable = [part for node in nodes if (part := sorted(set(node) & set(cores)))]
    if local_world == 1 or bind == "none":
        return everything
    if bind == "numa":
        if len(usable) < 2 or local_world % len(usable):
            return everything
        return usable[local_rank * len(usable) // local_world]
    if len(everything) < local_world:
        return everything
    ordered = [core for node in usable for core in node] or everything
    size = len(ordered) // local_world
    return sorted(ordered[local_rank * size : (local_rank + 1) * size])


def nodes(folder: Path = NODES) -> list[list[int]]:
    """The cores of each memory node; an empty list where the system does not say."""
    found = []
    for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            text = (node / "cpulist").read_text().strip()
        except OSError:
            continue
        if cores := sorted(members(text)):
            found.append(cores)
    return found


def keep_memory(environment: Mapping[str, str]) -> bool:
    """Have the C library keep what is freed. False where the user has said something about it, or it is not glibc.

    By default glibc gives back what is free at the end of its heap, and every larger block: the results of a training step are
    then found and zeroed by the kernel, page by page, at every step. Blocks above its highest threshold still come and go.
    """
    if any(name.startswith("MALLOC_") for name in environment) or "GLIBC_TUNABLES" in environment:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((M_MMAP_THRESHOLD, LARGEST_THRESHOLD), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(option, value) == 1 for option, value in wanted)
