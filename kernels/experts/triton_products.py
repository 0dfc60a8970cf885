"""Products of sorted rows with the matrices of their experts: one launch for all experts, however uneven or empty.

A program takes one tile of rows, all of one expert, and one tile of columns. Rows are gathered by the load and scattered by
the store, so nothing is permuted in memory and nothing is padded; programs past the last tile end at once, so the host needs
not know the loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.tiles import die_order
from kernels.experts.triton_activations import activated


@triton.jit
def find_tile(
    table, E: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
):  # fmt: skip
    """(expert, first row of the tile, rows left to the expert from there on, column tile, whether there is such a tile).

    table: of triton_sort.Sorted. Neighbouring programs take GROUP tiles of rows of the same columns, so that matrices are read
    from the cache; on a device of several dies, neighbours share one die's.
    """
    program = tl.program_id(0)
    tiles = tl.load(table + BINS + E)
    work = program < tiles * COLUMNS
    program = die_order(program, tiles * COLUMNS, GROUP, DIES)
    first = program // (GROUP * COLUMNS) * GROUP
    rows = tl.maximum(tl.minimum(tiles - first, GROUP), 1)
    within = program % (GROUP * COLUMNS)
    tile = first + within % rows
    bins = tl.arange(0, BINS)
    starts = tl.load(table + BINS + bins, mask=bins < E, other=2147483647)
    # Experts without rows begin where the next one begins: the last that begins here has the rows.
    expert = tl.maximum(tl.sum((starts <= tile).to(tl.int32), axis=0) - 1, 0)
    begin = tl.load(table + expert) + (tile - tl.load(table + BINS + expert)) * TILE
    return expert, begin, tl.load(table + expert + 1) - begin, within // rows, work


@triton.jit
def multiply(
    left, right, total, K: tl.constexpr, STEP_LEFT: tl.constexpr, STEP_RIGHT: tl.constexpr, mask,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + the product over K. left [M, BLOCK_K], right [BLOCK_K, N]: pointers; mask [1, N]: columns of right."""
    ks = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(left)
            b = tl.load(right, mask=mask, other=0.0)
        else:
            a = tl.load(left, mask=ks[None, :] < K - start, other=0.0)
            b = tl.load(right, mask=mask & (ks[:, None] < K - start), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K * STEP_LEFT
        right += BLOCK_K * STEP_RIGHT
    return total


@triton.jit
def up_kernel(
    x, weight, scores, order, table, hidden, acted,
    D: tl.constexpr, F: tl.constexpr, CHOICES: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, DIES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden [P, 2F] = x[token] G | x[token] U (if KEEP); acted [P, F] = act(gate) * up * weight. Not GATED: hidden [P, F].

    x [N, D], weight [E, D, 2F or F], scores [N * CHOICES].
    """
    WIDTH: tl.constexpr = 2 * F if GATED else F
    expert, begin, left_over, column, work = find_tile(table, E, BINS, TILE, (F + BLOCK_N - 1) // BLOCK_N, GROUP, DIES)
    if work:
        row = tl.arange(0, TILE)
        inside = row < left_over
        choice = tl.load(order + begin + row, mask=inside, other=0)
        f = column * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        columns = (f < F)[None, :]
        left = x + (choice // CHOICES).to(tl.int64)[:, None] * D + ks[None, :]
        right = weight + tl.cast(expert, tl.int64) * D * WIDTH + ks[:, None] * WIDTH + f[None, :]
        up = tl.zeros([TILE, BLOCK_N], dtype=tl.float32)
        if GATED:
            gate = tl.zeros([TILE, BLOCK_N], dtype=tl.float32)
            for start in range(0, D, BLOCK_K):
                if D % BLOCK_K == 0:
                    a = tl.load(left)
                    b = tl.load(right, mask=columns, other=0.0)
                    c = tl.load(right + F, mask=columns, other=0.0)
                else:
                    more = ks < D - start
                    a = tl.load(left, mask=more[None, :], other=0.0)
                    b = tl.load(right, mask=columns & more[:, None], other=0.0)
                    c = tl.load(right + F, mask=columns & more[:, None], other=0.0)
                gate = tl.dot(a, b, gate, input_precision=PRECISION)
                up = tl.dot(a, c, up, input_precision=PRECISION)
                left += BLOCK_K
                right += BLOCK_K * WIDTH
        else:
            up = multiply(left, right, up, D, 1, WIDTH, columns, PRECISION, BLOCK_K)
        mask = inside[:, None] & columns
        # Offsets within a tile fit 32 bits, which halves the registers of addresses.
        at = tl.cast(begin, tl.int64)
        if KEEP:
            to = hidden + at * WIDTH + (row[:, None] * WIDTH + f[None, :])
            if GATED:
                tl.store(to, gate.to(hidden.dtype.element_ty), mask=mask)
                tl.store(to + F, up.to(hidden.dtype.element_ty), mask=mask)
            else:
                tl.store(to, up.to(hidden.dtype.element_ty), mask=mask)
        if GATED:
            value, _ = activated(gate, ACTIVATION)
            value *= up
        else:
            value, _ = activated(up, ACTIVATION)
        value *= tl.load(scores + choice).to(tl.float32)[:, None]
        tl.store(acted + at * F + (row[:, None] * F + f[None, :]), value.to(acted.dtype.element_ty), mask=mask)


@triton.jit
def out_kernel(
    source, weight, order, table, out,
    K: tl.constexpr, D: tl.constexpr, STRIDE_E: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_D: tl.constexpr,
    E: tl.constexpr, BINS: tl.constexpr, PRECISION: tl.constexpr, DIES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [P, D] in the order of choices = source [P, K], rows sorted, times weight[expert] [K, D] of the given strides."""
    expert, begin, left_over, column, work = find_tile(table, E, BINS, TILE, (D + BLOCK_N - 1) // BLOCK_N, GROUP, DIES)
    if work:
        row = tl.arange(0, TILE)
        inside = row < left_over
        d = column * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        columns = (d < D)[None, :]
        # Rows past the end are read as the first of the tile, and not written.
        left = source + tl.cast(begin, tl.int64) * K + (tl.where(inside, row, 0)[:, None] * K + ks[None, :])
        right = weight + tl.cast(expert, tl.int64) * STRIDE_E + ks[:, None] * STRIDE_K + d[None, :] * STRIDE_D
        total = tl.zeros([TILE, BLOCK_N], dtype=tl.float32)
        total = multiply(left, right, total, K, 1, STRIDE_K, columns, PRECISION, BLOCK_K)
        choice = tl.load(order + begin + row, mask=inside, other=0).to(tl.int64)
        tl.store(out + choice[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & columns)


@triton.jit(do_not_specialize=["N"])
def combine_kernel(
    rows, y, N, D: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # y [N, D] = rows [N, CHOICES, D] summed over choices, in fp32 and in their order
    program = tl.program_id(0)
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    n = tl.cast(program // columns, tl.int64) * ROWS + tl.arange(0, ROWS)
    d = program % columns * BLOCK + tl.arange(0, BLOCK)
    mask = (n < N)[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for j in tl.static_range(CHOICES):
        total += tl.load(rows + (n * CHOICES + j)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + n[:, None] * D + d[None, :], total.to(y.dtype.element_ty), mask=mask)
