"""torch.compile for a model's blocks, from outside: names and results stay what they were.

Block by block: blocks that look alike share their programs, so that a deep model is compiled as fast as a shallow one. What moves
along the sequence and what is routed runs as it is written (kernels/common/opaque.py), so all packings of rows share them, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from kernels.common import opaque

# Programs for one piece of code: kinds of layers, times training or not, times fixed shapes or not. By default torch gives up
# after 8, without an error, and runs what is not compiled.
PROGRAMS = 64
MARK = "_compiled_by_blocks"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}
GIVEN = {variable: os.environ.get(variable) for variable in CACHES}  # the compiler sets them, too, when it is imported


def apply_compile(blocks: Iterable[nn.Module], backend: str | Callable[..., object] = "inductor") -> None:
    """Compiles each block's forward, at its first call. Call it before blocks are recomputed or sharded, which goes around it."""
    import torch._dynamo  # seconds, that others need not wait

    opaque.prepare()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)
        block.__dict__[MARK] = True  # no parameter, no module


def is_compiled(module: nn.Module) -> bool:
    """Whether this module or one within is compiled."""
    return any(
        MARK in vars(child) or getattr(child, "_compiled_call_impl", None) is not None for child in module.modules()
    )


def keep_programs(folder: Path) -> Path:
    """From now on, compiled programs are kept in this folder, the Triton kernels' as well, for later runs on machines like this.

    Returns the folder; that of the environment (TORCHINDUCTOR_CACHE_DIR) where it named one when this process began.
    """
    for variable, name in CACHES.items():
        if GIVEN[variable] is None:
            os.environ[variable] = str(folder / name)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


class Programs(NamedTuple):
    """What torch.compile has done in this process. graphs: pieces of code traced; found, made: programs for them (forward and
    backward) that were in the cache, and that were not."""

    graphs: int
    found: int
    made: int

    @classmethod
    def so_far(cls) -> Programs:
        from torch._dynamo.utils import counters

        inductor = counters["inductor"]
        made = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
        return cls(counters["stats"]["unique_graphs"], inductor["fxgraph_cache_hit"], made)
