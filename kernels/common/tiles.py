"""Tiles of two-dimensional tensors, read through pointers or through tensor descriptors, and the order of programs.

A descriptor leaves addresses, masks and the copy itself to the tensor memory accelerator of NVIDIA's Hopper and later: in
a loop that holds several tiles this saves tens of registers per thread. Everywhere else plain pointers compile to better
code. A kernel takes either form of the same argument and a constexpr that says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.architecture import architecture, facts


@triton.jit
def die_order(program, programs, GROUP: tl.constexpr, DIES: tl.constexpr):
    """A permutation of the `programs` of a grid, after which GROUP neighbours run on the same die.

    A device of several dies (AMD's XCDs) deals programs to them in turn, and each die has a cache of its own: neighbours
    that read the same tensors would fetch them once a die. Groups are dealt in turn instead, so that the dies stay equally
    loaded; what is left after the last whole round is cut into one range a die. DIES 1 generates no code.
    """
    if DIES > 1 and GROUP > 1:
        whole = programs // (DIES * GROUP) * (DIES * GROUP)
        die = program % DIES
        turn = program // DIES
        left = programs - whole
        later = whole + die * (left // DIES) + tl.minimum(die, left % DIES) + turn - whole // DIES
        program = tl.where(program < whole, (turn // GROUP * DIES + die) * GROUP + turn % GROUP, later)
    return program


@triton.jit
def die_order_rows(GROUP: tl.constexpr, DIES: tl.constexpr):
    """(column, row) of this program of a two-dimensional grid, in die_order."""
    column = tl.program_id(0)
    row = tl.program_id(1)
    if DIES > 1 and GROUP > 1:
        columns = tl.num_programs(0)
        program = die_order(row * columns + column, tl.num_programs(1) * columns, GROUP, DIES)
        column = program % columns
        row = program // columns
    return column, row


@triton.jit
def load_tile(source, row, column, within, STRIDE: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """The tile at (row, column) of a [rows, STRIDE] tensor. within: offsets inside the tile, for pointers only."""
    if DESCRIPTOR:
        tile = source.load([tl.cast(row, tl.int32), tl.cast(column, tl.int32)])
    else:
        tile = tl.load(source + tl.cast(row, tl.int64) * STRIDE + column + within)
    return tile


@triton.jit
def load_tile_masked(source, row, column, within, mask, STRIDE: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """As load_tile, but pointers read 0 where not `mask`. A descriptor reads what is there, or 0 outside the tensor."""
    if DESCRIPTOR:
        tile = source.load([tl.cast(row, tl.int32), tl.cast(column, tl.int32)])
    else:
        tile = tl.load(source + tl.cast(row, tl.int64) * STRIDE + column + within, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(target, row, column, within, tile, mask, STRIDE: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Writes a tile where load_tile_masked reads it. A descriptor writes all of it that lies within the tensor."""
    if DESCRIPTOR:
        target.store([tl.cast(row, tl.int32), tl.cast(column, tl.int32)], tile)
    else:
        tl.store(target + tl.cast(row, tl.int64) * STRIDE + column + within, tile, mask=mask)


def dies(device: torch.device) -> int:
    """Dies that programs are dealt to in turn: the kernels' DIES."""
    return facts(architecture(device)).dies


def descriptors_pay(device: torch.device) -> bool:
    """Whether the device has hardware behind descriptors."""
    return architecture(device) in ("sm90", "sm100")


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x laid out row by row, starting on a 16-byte boundary, as descriptors require; itself where it already is."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def descriptor(x: torch.Tensor | None, width: int, block: Sequence[int], wanted: bool) -> object:
    """x as a [rows, width] tensor, read in tiles of `block`: as a descriptor if wanted, else x itself, for its pointer."""
    if x is None or not wanted:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], list(block))
