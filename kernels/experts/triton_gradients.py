"""Backward kernels of the routed feed-forward. The gradient of x is triton_products.out_kernel with the other matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.common.tiles import die_order
from kernels.experts.triton_activations import activated
from kernels.experts.triton_products import find_tile, multiply


@triton.jit
def finish(
    d, score, hidden, d_hidden, acted, row, f, inside, F: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """What follows the product, for some columns f: writes d_hidden and acted, returns their part of the score's gradient."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    mask = inside[:, None] & (f < F)[None, :]
    here = row[:, None] * WIDTH + f[None, :]
    gate = tl.load(hidden + here, mask=mask, other=0.0).to(tl.float32)
    value, slope = activated(gate, ACTIVATION)
    weighted = d * score[:, None]
    if GATED:
        up = tl.load(hidden + F + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_hidden + here, (weighted * up * slope).to(d_hidden.dtype.element_ty), mask=mask)
        tl.store(d_hidden + F + here, (weighted * value).to(d_hidden.dtype.element_ty), mask=mask)
        value *= up
    else:
        tl.store(d_hidden + here, (weighted * slope).to(d_hidden.dtype.element_ty), mask=mask)
    to = acted + row[:, None] * F + f[None, :]
    tl.store(to, (value * score[:, None]).to(acted.dtype.element_ty), mask=mask)
    return tl.sum(value * d, axis=1)


@triton.jit(do_not_specialize=["P"])
def hidden_gradient_kernel(
    dy, weight, scores, hidden, order, table, d_hidden, acted, d_scores, P,
    D: tl.constexpr, F: tl.constexpr, CHOICES: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, DIES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d_hidden, as hidden [P, 2F or F]; acted [P, F] once more; d_scores [column tiles, P]: to be summed, in choices' order.

    dy [N, D], weight [E, F, D] (down), scores [N * CHOICES].
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
        left = dy + (choice // CHOICES).to(tl.int64)[:, None] * D + ks[None, :]
        right = weight + tl.cast(expert, tl.int64) * F * D + f[None, :] * D + ks[:, None]
        d = tl.zeros([TILE, BLOCK_N], dtype=tl.float32)
        d = multiply(left, right, d, D, 1, 1, columns, PRECISION, BLOCK_K)
        at = tl.cast(begin, tl.int64)
        place = (hidden + at * WIDTH, d_hidden + at * WIDTH, acted + at * F)
        score = tl.load(scores + choice).to(tl.float32)
        f = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        low, high = tl.permute(tl.reshape(d, TILE, 2, BLOCK_N // 2), 0, 2, 1).split()
        d_weight = finish(low, score, place[0], place[1], place[2], row, f, inside, F, ACTIVATION, GATED)
        d_weight += finish(
            high, score, place[0], place[1], place[2], row, f + BLOCK_N // 2, inside, F, ACTIVATION, GATED
        )
        tl.store(d_scores + tl.cast(column, tl.int64) * P + choice, d_weight, mask=inside)


@triton.jit
def weight_gradient_kernel(
    left, right, order, table, out,
    M: tl.constexpr, N: tl.constexpr, LEFT_CHOICES: tl.constexpr, RIGHT_CHOICES: tl.constexpr,
    E: tl.constexpr, BINS: tl.constexpr, PRECISION: tl.constexpr, DIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [E, M, N]: of each expert, left^T right over its rows. Grid: E times tiles.

    left [*, M], right [*, N]: rows sorted where LEFT_CHOICES or RIGHT_CHOICES is 0; else a row a token, of that many choices.
    """
    rows_of: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    columns_of: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = die_order(tl.program_id(0), E * rows_of * columns_of, GROUP, DIES)
    expert = program // (rows_of * columns_of)
    within = program % (rows_of * columns_of)
    first = within // (GROUP * columns_of) * GROUP
    size = tl.minimum(rows_of - first, GROUP)
    within = within % (GROUP * columns_of)
    m = (first + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // size * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(table + expert)
    end = tl.load(table + expert + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        at_left = rows
        at_right = rows
        if LEFT_CHOICES > 0:
            at_left = tl.load(order + rows, mask=inside, other=0) // LEFT_CHOICES
        if RIGHT_CHOICES > 0:
            at_right = tl.load(order + rows, mask=inside, other=0) // RIGHT_CHOICES
        a = tl.load(
            left + at_left.to(tl.int64)[None, :] * M + m[:, None], mask=inside[None, :] & (m < M)[:, None], other=0.0
        )
        b = tl.load(
            right + at_right.to(tl.int64)[:, None] * N + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = out + tl.cast(expert, tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
