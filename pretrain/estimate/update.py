"""What optimizers keep and compute: pretrain/optim/ in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from kernels.newton_schulz.chunked import BLOCKS, BLOCKS_FROM, flops
from kernels.newton_schulz.coefficients import resolve
from pretrain.model.decoder import Decoder
from pretrain.optim.adamw import AdamWConfig
from pretrain.optim.lamb import LAMBConfig
from pretrain.optim.matrices import Described, describe
from pretrain.optim.muon import MuonConfig
from pretrain.optim.sgd import SGDConfig

Sizes = Mapping[tuple[int, int], int]
"""(rows, columns) of matrices -> how many."""


def matrices(optimizer: Any, model: Decoder) -> Described:
    """Of each parameter by its name, the matrices that the optimizer orthogonalises; nothing of those that it updates otherwise.

    Raises ValueError for patterns of names that fit no parameter.
    """
    return describe(model, optimizer.per_head, optimizer.adamw) if isinstance(optimizer, MuonConfig) else {}


def moments(optimizer: Any, orthogonalised: bool) -> int:
    """Elements of state, in fp32, for each of a parameter's. Steps, one number a parameter, are not counted."""
    if isinstance(optimizer, AdamWConfig | LAMBConfig):
        return 2
    if isinstance(optimizer, MuonConfig):
        return 1 if orthogonalised else 2
    assert isinstance(optimizer, SGDConfig), f"the state of {type(optimizer).__name__} is not known here"
    return 1 if optimizer.momentum else 0


class Updated(NamedTuple):
    """Elements of the parameters that one rank updates: those that decay, the others; of both, in matrices that are
    orthogonalised; of the largest parameter."""

    decayed: int
    others: int
    orthogonalised: int
    largest: int


def scratch(optimizer: Any, sums: Updated) -> float:
    """Bytes that an update needs for a moment."""
    decayed, others, _, _ = sums
    if isinstance(optimizer, AdamWConfig):
        return 0.0 if optimizer.fuses("cuda") else 4.0 * max(decayed, others)  # square roots, a whole group at a time
    if isinstance(optimizer, LAMBConfig):
        return 4.0 * (decayed + others + sums.largest)  # all updates wait for the norms
    if isinstance(optimizer, MuonConfig):
        # Of a round: its directions and the next one's in the precision of the products, results in fp32, and these scaled.
        low = 2.0 if optimizer.precision == "bf16" else 4.0
        most = max(sums.largest, math.ceil(optimizer.bucket_bytes / low))
        return (3.0 * low + 8.0) * min(sums.orthogonalised, most)
    decays = bool(optimizer.weight_decay)  # then gradients are copied to add to them, and Nesterov's are copies, too
    return 4.0 * max(decayed * (decays + optimizer.nesterov), others * optimizer.nesterov)


def update_flops(optimizer: Any, counts: Sizes, ranks: int, gpu: bool) -> float:
    """FLOPs of an update on the busiest of the ranks that share out these matrices; one rank works on each by itself."""
    if not isinstance(optimizer, MuonConfig) or not counts:
        return 0.0
    steps, low = len(resolve(optimizer.iteration)), optimizer.precision == "bf16"
    each = {size: iteration_flops(*size, steps, low, gpu) for size in counts}
    return max(sum(each[size] * count for size, count in counts.items()) / ranks, max(each.values()))


def iteration_flops(m: int, n: int, steps: int, low: bool, gpu: bool) -> float:
    """FLOPs of the Newton-Schulz iterations of an m x n matrix, in the form that kernels.newton_schulz takes.

    low: in bf16. Symmetric products are computed by half on GPUs; on CPUs whole in bf16 and, where small, in fp32.
    """
    small = min(m, n)
    half = gpu or not low
    gram = flops(m, n, steps, True, half) < flops(m, n, steps, False, half)
    part = 0.5
    if not gpu:
        part = _upper(small) if not low and small >= BLOCKS_FROM else 1.0
    least, whole = (flops(m, n, steps, gram, each) for each in (True, False))
    return least + (2.0 * part - 1.0) * (whole - least)


def _upper(size: int) -> float:
    """The share of a symmetric matrix that lies in blocks of rows from the diagonal on."""
    block = -(-size // BLOCKS)
    return sum(min(block, size - low) * (size - low) for low in range(0, size, block)) / size**2
