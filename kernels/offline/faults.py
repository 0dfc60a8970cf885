"""Small kernels with a fault planted in each: the checker must stop every one, and pass the sound one.

A checker that never says no is worse than none, and it can stop saying no through an upgrade of triton or of its
tools. `python -m kernels.check --mutate` runs these on the real compilers; where the fault cannot be caused by source
or options on an architecture, it is planted in what the compiler produced.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.architecture import Architecture, facts
from kernels.offline.sweep import Result, judge
from kernels.offline.trace import Launch, trace_call


@triton.jit
def product(
    a, b, o, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # o [M, N] = sum over steps of a [steps, M, K] @ b [steps, K, N]
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, N)[None, :]
    inner = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        left = tl.load(a + step * M * K + rows * K + inner[None, :])
        right = tl.load(b + step * K * N + inner[:, None] * N + columns)
        total += tl.dot(left, right, input_precision=PRECISION)
    tl.store(o + rows * N + columns, total)


@dataclass(frozen=True)
class Fault:
    """A launch of `product`, and the kind of problem that the checker must name ("": it must find nothing)."""

    name: str
    expected: str
    sizes: tuple[int, int, int] = (64, 64, 64)
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    options: Mapping[str, int] = field(default_factory=dict)
    damage: Callable[[dict[str, Any]], None] | None = None  # done to the compiler's output

    def launch(self, arch: Architecture) -> Launch:
        M, N, K = self.sizes
        a, b = torch.zeros(1, M, K, dtype=self.dtype), torch.zeros(1, K, N, dtype=self.dtype)
        o = torch.zeros(M, N)
        trace = trace_call(arch, lambda: product[(1,)](a, b, o, 16, M, N, K, self.precision, **self.options))
        assert len(trace.launches) == 1, "one call of one kernel is one launch"
        found = trace.launches[0]
        if self.damage is None or found.compiled is None:
            return found
        asm = dict(found.compiled.asm)
        self.damage(asm)
        return dataclasses.replace(found, compiled=SimpleNamespace(asm=asm, metadata=found.compiled.metadata))


def _without(stage: str, pattern: str) -> Callable[[dict[str, Any]], None]:
    def damage(asm: dict[str, Any]) -> None:
        assert re.search(pattern, asm[stage], flags=re.MULTILINE), f"nothing to remove: {pattern} in {stage}"
        asm[stage] = re.sub(pattern, "", asm[stage], flags=re.MULTILINE)

    return damage


def _scalar_layout(asm: dict[str, Any]) -> None:
    changed = re.sub(r"^(#mma\d*) = #ttg\.\w+", r"\1 = #ttg.blocked", asm["ttgir"], flags=re.MULTILINE)
    assert changed != asm["ttgir"], "no matrix layout to change"
    asm["ttgir"] = changed


def _empty(stage: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(asm: dict[str, Any]) -> None:
        asm[stage] = value

    return damage


def faults(arch: Architecture) -> list[Fault]:
    """The sound kernel, then one fault a line."""
    sound = Fault("nothing wrong", "")
    if arch.vendor == "amd":
        big = arch.shared_memory_block > 65536
        return [
            sound,
            # a cap on registers is met by spilling
            Fault("registers spill", "spill", (128, 128, 64), options={"waves_per_eu": 6}),
            Fault("shared memory overflows", "shared", (256, 256, 128), options={"num_warps": 8, "num_stages": 4}),
            # nonkdim 4 has no bf16 instruction of this shape: triton falls back to scalar code in silence
            Fault("matrix instructions are lost", "matrix", (32, 32, 32), options={"matrix_instr_nonkdim": 4}),
            Fault("one dot has a scalar layout", "matrix", damage=_scalar_layout),
            Fault(
                "one block of two warps fills a CU",
                "occupancy",
                (64, 64, 256) if big else (64, 64, 128),
                options={"num_warps": 2, "num_stages": 3},
            ),
            Fault("an option of the other vendor", "compile", options={"maxnreg": 128}),
            Fault("the spill count is missing", "unreadable", damage=_without("amdgcn", r"^.*\.vgpr_spill_count.*$")),
            Fault("the occupancy is missing", "unreadable", damage=_without("amdgcn", r"^; Occupancy.*$")),
            Fault("the lowered code is missing", "unreadable", damage=_empty("ttgir", "")),
        ]
    return [
        sound,
        Fault("registers spill", "spill", (256, 256, 32), options={"num_warps": 4, "num_stages": 1}),
        Fault("shared memory overflows", "shared", (256, 256, 64), options={"num_warps": 8, "num_stages": 5}),
        Fault(
            "matrix instructions are lost",
            "matrix",
            damage=_without("ptx", r"^.*(wgmma\.mma_async|mma\.sync|tcgen05\.mma).*$"),
        ),
        Fault("one dot has a scalar layout", "matrix", options={"num_warps": 2}, damage=_scalar_layout),
        Fault("full-precision dots have no matrix instruction", "", (32, 32, 32), torch.float32),
        Fault(
            "one block of two warps fills an SM",
            "occupancy",
            (64, 64, 256),
            options={"num_warps": 2, "num_stages": 3},
        ),
        Fault("an option of the other vendor", "compile", options={"waves_per_eu": 2}),
        Fault("the binary is not readable", "unreadable", damage=_empty("cubin", b"not a binary")),
        Fault("the lowered code is missing", "unreadable", damage=_empty("ttgir", "")),
    ]


def run(arch_name: str) -> list[tuple[Fault, Result, bool]]:
    """Every fault with what the checker said, and whether that was right."""
    arch = facts(arch_name)
    outcomes = []
    for fault in faults(arch):
        result = judge(fault.launch(arch), arch, "faults", fault.name)
        kinds = {kind for kind, _ in result.problems}
        right = fault.expected in kinds if fault.expected else not kinds
        outcomes.append((fault, result, right))
    return outcomes
