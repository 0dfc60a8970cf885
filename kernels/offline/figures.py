"""The figures of a compiled kernel, read out of the compilers' own output.

AMD: the assembly text carries a metadata block and an occupancy comment. NVIDIA: `cuobjdump`, which comes with
triton, reads the finished binary; instructions are counted in the PTX. Nothing has a default: a figure that cannot
be read is an error, because a checker that passes on missing data is worse than none.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.architecture import Architecture


class Unreadable(Exception):
    """A figure that every kernel has was not found."""


@dataclass(frozen=True)
class Dots:
    """The matrix products of a kernel."""

    total: int  # tt.dot in the source IR
    capable: int  # of these, the ones that matrix units can do at the asked precision
    lost: int  # capable ones that were lowered to scalar multiply-adds, as the layouts in the lowered IR show


@dataclass(frozen=True)
class Figures:
    registers: int  # 32-bit, per lane; AMD: vector and accumulation registers together
    accumulation_registers: int  # AMD only, part of `registers`; 0 on NVIDIA
    spills: int  # AMD: vector registers spilled; NVIDIA: local loads and stores
    scalar_spills: int  # AMD: to lanes of vector registers, no memory traffic; 0 on NVIDIA
    scratch: int  # bytes of private memory per lane
    shared: int  # bytes per block
    warps: int  # per block
    blocks: int  # resident on one CU or SM
    occupancy: float  # resident warps per SIMD
    matrix: Mapping[str, int]  # matrix instructions by name
    dots: Dots
    wide_loads: int  # global loads of 16 bytes a lane (or bulk copies)
    loads: int  # all global loads


def read(compiled: Any, arch: Architecture) -> Figures:
    """The figures of one compiled kernel (triton's CompiledKernel). Raises Unreadable."""
    metadata, asm = compiled.metadata, compiled.asm
    shared, warps = metadata.shared, metadata.num_warps
    if not isinstance(shared, int) or not isinstance(warps, int):
        raise Unreadable("shared memory and number of warps in the metadata")
    dots = count_dots(_text(asm, "ttir"), _text(asm, "ttgir"), arch.vendor)
    if arch.vendor == "amd":
        return _amd(_text(asm, "amdgcn"), shared, warps, dots, arch)
    return _nvidia(_text(asm, "ptx"), asm["cubin"], shared, warps, dots, arch)


def _text(asm: Mapping[str, Any], stage: str) -> str:
    text = asm.get(stage)
    if not isinstance(text, str) or not text.strip():
        raise Unreadable(f"the compiler's {stage} output")
    return text


def _number(pattern: str, text: str, what: str) -> int:
    found = re.findall(pattern, text, flags=re.MULTILINE)
    if len(found) != 1:
        raise Unreadable(f"{what} (found {len(found)} times, expected once)")
    return int(found[0])


def _amd(text: str, shared: int, warps: int, dots: Dots, arch: Architecture) -> Figures:
    registers = _number(r"^\s*\.vgpr_count:\s*(\d+)", text, ".vgpr_count")
    by_registers = _number(r"^; Occupancy:\s*(\d+)", text, "Occupancy")
    blocks = arch.blocks_resident(registers, shared, warps)
    instructions = re.findall(r"^\s+([a-z]\w+)", text, flags=re.MULTILINE)
    loads = [name for name in instructions if re.match(r"(buffer|global)_load_", name)]
    return Figures(
        registers=registers,
        accumulation_registers=_number(r"^\s*-?\s*\.agpr_count:\s*(\d+)", text, ".agpr_count"),
        spills=_number(r"^\s*\.vgpr_spill_count:\s*(\d+)", text, ".vgpr_spill_count"),
        scalar_spills=_number(r"^\s*\.sgpr_spill_count:\s*(\d+)", text, ".sgpr_spill_count"),
        scratch=_number(r"^\s*\.private_segment_fixed_size:\s*(\d+)", text, ".private_segment_fixed_size"),
        shared=shared,
        warps=warps,
        blocks=blocks,
        # LLVM counts registers (scalar ones too) but not shared memory, which is given at launch.
        occupancy=min(float(by_registers), blocks * warps / arch.simds),
        matrix=dict(Counter(name for name in instructions if name.startswith(("v_mfma_", "v_smfmac_")))),
        dots=dots,
        wide_loads=sum("dwordx4" in name for name in loads),
        loads=len(loads),
    )


def _nvidia(ptx: str, cubin: bytes, shared: int, warps: int, dots: Dots, arch: Architecture) -> Figures:
    usage = _cuobjdump("-res-usage", cubin)
    registers = _number(r"\bREG:(\d+)", usage, "registers (cuobjdump -res-usage)")
    stack = _number(r"\bSTACK:(\d+)", usage, "stack bytes (cuobjdump -res-usage)")
    local = _number(r"\bLOCAL:(\d+)", usage, "local bytes (cuobjdump -res-usage)")
    # The listing takes 0.3 s, and a kernel without local memory has nothing to count in it.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", _cuobjdump("-sass", cubin))) if stack or local else 0
    blocks = arch.blocks_resident(registers, shared, warps)
    matrix = Counter(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))
    direct = re.findall(r"\bld\.global([.\w:]*)", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[.\w:]*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)", ptx)
    bulk = len(re.findall(r"\bcp\.async\.bulk\.tensor[.\w:]*shared[.\w:]*global", ptx))
    wide = sum(bool(re.search(r"\.v4\.\w32|\.v2\.\w64|\.v8\.", kind)) for kind in direct)
    wide += sum(int(size, 0) == 16 for size in copies)
    return Figures(
        registers=registers,
        accumulation_registers=0,
        spills=spills,
        scalar_spills=0,
        scratch=stack + local,
        shared=shared,
        warps=warps,
        blocks=blocks,
        occupancy=blocks * warps / arch.simds,
        matrix=dict(matrix),
        dots=dots,
        wide_loads=wide + bulk,
        loads=len(direct) + len(copies) + bulk,
    )


def _cuobjdump(what: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run(
                [knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, timeout=300
            )
        except (OSError, subprocess.TimeoutExpired, RuntimeError) as error:
            raise Unreadable(f"the binary: cuobjdump {what} did not run ({error})") from error
    if done.returncode != 0:
        raise Unreadable(f"the binary: cuobjdump {what} failed ({done.stderr.strip()[:200]})")
    return done.stdout


def count_dots(ttir: str, ttgir: str, vendor: str) -> Dots:
    """Dots in the source IR, and capable ones that the lowering gave a layout without matrix units."""
    if "tt.func" not in ttir or "tt.func" not in ttgir:
        raise Unreadable("functions in the compiler's intermediate representations")
    source = _dots(ttir)
    capable = sum(_capable(dot, vendor) for dot in source)
    kinds = dict(re.findall(r"^#(\w+)\s*=\s*#(\w+\.\w+)", ttgir, flags=re.MULTILINE))  # "mma": "ttg.amd_mfma"
    lost = 0
    for dot in _dots(ttgir):
        layout = re.search(r"#(\w+)", dot[2])
        if layout is None:
            raise Unreadable("the layout of a dot in the lowered representation")
        matrix_layout = re.search(r"mf?ma", kinds.get(layout.group(1), layout.group(0)))
        if matrix_layout is None and _capable(dot, vendor):
            lost += 1
    return Dots(len(source), capable, lost)


def _dots(text: str) -> list[tuple[str, str, str]]:
    """(precision, operand element type, result type) of every tt.dot. A line of it reads

    %d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>
    """
    lines = [line for line in text.splitlines() if re.search(r"\btt\.dot\b", line)]
    dots = []
    for line in lines:
        found = re.search(r":\s*tensor<(.*?)>\s*\*\s*tensor<(.*?)>\s*->\s*tensor<(.*)>", line)
        element = re.match(r"(?:\d+x)+(\w+)", found.group(1)) if found else None
        if found is None or element is None:
            raise Unreadable(f"a dot: {line.strip()[:160]}")
        precision = re.search(r"inputPrecision\s*=\s*(\w+)", line)
        dots.append((precision.group(1) if precision else "ieee", element.group(1), found.group(3)))
    return dots


def _capable(dot: tuple[str, str, str], vendor: str) -> bool:
    precision, element, _ = dot
    if element == "f64":
        return False
    # NVIDIA has no matrix instruction for full-precision fp32; AMD's CDNA does.
    return not (element == "f32" and precision == "ieee" and vendor == "nvidia")
