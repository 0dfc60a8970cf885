"""A chunk's logits to losses and gradients: Triton form, for the loop over chunks in chunked.py.

Two passes over the logits. The first leaves four numbers of each row and slice of the vocabulary (logits.py says which); the
second merges them, of all slices and, where ranks share out the vocabulary, of all ranks, and writes gradients over the logits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.architecture import architecture, facts
from kernels.cross_entropy import chunked
from kernels.cross_entropy.logits import Shard, Terms
from kernels.tuning import parameters

# BLOCK: logits at a time. WAVES: programs per CU or SM, by which rows are cut into slices where a chunk has few.
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    "cross_entropy": {"generic": {"BLOCK": 4096, "WAVES": 4, "num_warps": 8, "num_stages": 1}},
}
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "cross_entropy": [{"BLOCK": n, "num_warps": w} for n in (2048, 4096, 8192) for w in (4, 8, 16)],
}
UNITS_UNKNOWN = 8  # where the number of CUs or SMs is not known


@triton.jit(do_not_specialize=["C", "first"])
def statistics_kernel(
    logits, bias, targets, parts, C, V, span, first, BLOCK: tl.constexpr, BIAS: tl.constexpr, SPREAD: tl.constexpr
):  # fmt: skip
    """parts [S, 4, C] of logits [C, V]: largest, sum of exponentials, target's logit, sum. Grid: rows, slices of `span`."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    begin = part * span
    end = tl.minimum(begin + span, V)
    here = logits + tl.cast(row, tl.int64) * V
    top = -float("inf")
    total = 0.0
    spread = 0.0
    for start in range(begin, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < end
        z = tl.load(here + v, mask=mask, other=-float("inf")).to(tl.float32)
        if BIAS:
            z += tl.load(bias + v, mask=mask, other=0.0).to(tl.float32)
        if SPREAD:
            spread += tl.sum(tl.where(mask, z, 0.0), axis=0)
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    target = tl.load(targets + row) - first
    own = (target >= begin) & (target < end)
    hit = tl.load(here + target, mask=own, other=0.0).to(tl.float32)
    if BIAS:
        hit += tl.load(bias + target, mask=own, other=0.0).to(tl.float32)
    to = parts + part * 4 * C + row
    tl.store(to, top)
    tl.store(to + C, total)
    tl.store(to + 2 * C, hit)
    tl.store(to + 3 * C, spread)


@triton.jit(do_not_specialize=["C", "first", "count", "vocabulary"])
def finish_kernel(
    logits, bias, targets, factor, parts, losses, C, V, span, first, count, vocabulary, z_loss, smooth,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """losses [C], and if LEARN the gradients in place of logits, of parts [count, 4, C]. Grid: rows, slices of `span`.

    A target outside the vocabulary makes its loss NaN: on a GPU the values were not looked at before.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    q = tl.arange(0, COUNT)
    at = parts + q * 4 * C + row
    tops = tl.load(at, mask=q < count, other=-float("inf"))
    top = tl.max(tops, axis=0)
    total = tl.sum(tl.load(at + C, mask=q < count, other=0.0) * tl.exp(tops - top), axis=0)
    hit = tl.sum(tl.load(at + 2 * C, mask=q < count, other=0.0), axis=0)
    spread = tl.sum(tl.load(at + 3 * C, mask=q < count, other=0.0), axis=0)
    lse = top + tl.log(total)
    even = smooth / vocabulary
    target = tl.load(targets + row)
    loss = lse - (1.0 - smooth) * hit - even * spread + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < vocabulary), loss, float("nan"))
    tl.store(losses + row, loss, mask=part == 0)
    if LEARN:
        here = logits + tl.cast(row, tl.int64) * V
        scale = tl.load(factor + row)
        rise = 1.0 + 2.0 * z_loss * lse
        begin = part * span
        end = tl.minimum(begin + span, V)
        for start in range(begin, end, BLOCK):
            v = start + tl.arange(0, BLOCK)
            mask = v < end
            z = tl.load(here + v, mask=mask, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(bias + v, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(z - lse) * rise - even - tl.where(v == target - first, 1.0 - smooth, 0.0)
            tl.store(here + v, (gradient * scale).to(logits.dtype.element_ty), mask=mask)


def token_losses(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor,
    terms: Terms,
    learn: bool,
    shard: Shard | None = None,
) -> Tensor:
    """See kernels.cross_entropy.logits.TokenLosses."""
    C, V = logits.shape
    losses = torch.empty(C, dtype=torch.float32, device=logits.device)
    if C == 0:
        return losses
    use = parameters("cross_entropy", architecture(logits.device), defaults=DEFAULTS, V=V)
    units = facts(architecture(logits.device)).units or UNITS_UNKNOWN
    # Every program has at least two blocks of work.
    slices = max(1, min(triton.cdiv(units * use.pop("WAVES"), C), V // (2 * use["BLOCK"])))
    span = triton.cdiv(V, slices * use["BLOCK"]) * use["BLOCK"]
    slices = triton.cdiv(V, span)
    first, vocabulary = (0, V) if shard is None else (shard.first, shard.vocabulary)
    parts = torch.empty(slices, 4, C, dtype=torch.float32, device=logits.device)
    statistics_kernel[(C, slices)](
        logits, bias, targets, parts, C, V, span, first, BIAS=bias is not None, SPREAD=terms.label_smoothing > 0, **use
    )  # fmt: skip
    parts = parts if shard is None else shard.gather(parts).contiguous()
    finish_kernel[(C, slices if learn else 1)](
        logits, bias, targets, factor, parts, losses, C, V, span, first, parts.shape[0], vocabulary, terms.z_loss,
        terms.label_smoothing, COUNT=triton.next_power_of_2(parts.shape[0]), BIAS=bias is not None, LEARN=learn, **use,
    )  # fmt: skip
    return losses


linear_cross_entropy = functools.partial(chunked.linear_cross_entropy, losses=token_losses)
