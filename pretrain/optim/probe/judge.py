"""Whether an update is the one that it should be, and how far off it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.newton_schulz import band
from pretrain.optim.probe.plain import Expected, orthogonal

# Largest differences, as shares of the largest number of an update. Newton-Schulz multiplies rounding in small singular values by
# up to 500; a wrong formula is off by 0.01 and more.
ALONE, PLAIN, PLAIN_MUON = 1e-5, 1e-5, 1e-4
ALONE_BF16, PLAIN_BF16 = 1e-2, 0.1
# Rounding of an fp32 weight, as a share of it: an update is a difference of two.
ROUNDED = 1.2e-7
# Singular values below these shares of the norm are not judged: they drown in the gradient's own rounding.
LIFTED, LIFTED_BF16 = 3e-3, 2e-2


@dataclass
class Line:
    """One parameter; of all steps the largest differences. alone: from the same optimizer on one rank; plain: from fp64.

    values: smallest and largest singular value (Muon) or trust ratio (LAMB); faults: what is wrong, in words.
    """

    name: str
    rule: str = ""
    matrices: int = 0
    alone: float = 0.0
    plain: float = 0.0
    values: tuple[float, float] | None = None
    faults: tuple[str, ...] = ()

    def see(self, low: float, high: float) -> None:
        self.values = (low, high) if self.values is None else (min(self.values[0], low), max(self.values[1], high))

    def complain(self, fault: str) -> None:
        self.faults = (*self.faults, fault)


def judge(
    line: Line, before: Tensor, after: Tensor, alone: Tensor, expected: Expected, low_precision: bool, iteration: str
) -> None:
    """Adds one step to a parameter's line. before, after, alone: its whole weights as they were, became, and are on one rank."""
    w, found = before.double(), after.double()
    scale = max((expected.weight - w).abs().max().item(), 1e-300)
    rounded = ROUNDED * w.abs().max().item()
    if not torch.isfinite(found).all():
        line.complain("weights are not finite")
        return
    bf16 = low_precision and expected.rule == "muon"
    off = _beyond(found - alone.double(), rounded) / scale
    line.alone = max(line.alone, off)
    if off > (ALONE_BF16 if bf16 else ALONE):
        line.complain(f"differs from one rank's by {off:.0e}")
    if not bf16:
        off = _beyond(found - expected.weight, rounded) / scale
        limit = PLAIN_MUON if expected.rule == "muon" else PLAIN
        line.plain = max(line.plain, off)
        if off > limit:
            line.complain(f"is not what {expected.rule} computes (off by {off:.0e} of the largest)")
    if expected.ratios:
        line.see(min(expected.ratios), max(expected.ratios))
    if expected.directions is not None:
        line.matrices = len(expected.directions)
        whole = found - expected.weight  # of the update, beside what it should be
        for matrix, direction, factor in expected.directions:
            place = tuple(slice(start, start + size) for start, size in zip(matrix.offsets, matrix.sizes))
            made = orthogonal(direction, iteration) - whole[place].reshape(direction.shape) / factor
            _judge_matrix(line, made, direction, bf16, iteration, rounded / factor)


def _judge_matrix(line: Line, made: Tensor, direction: Tensor, bf16: bool, iteration: str, rounded: float) -> None:
    """made: what the optimizer took for the orthogonalised direction. Both [m, n], fp64."""
    u, s, vt = torch.linalg.svd(direction, full_matrices=False)
    share = s / direction.norm().clamp_min(1e-300)
    lifted = share > (LIFTED_BF16 if bf16 else LIFTED)
    if not lifted.any():
        return
    inside = u.mT @ made @ vt.mT
    values = inside.diagonal()[lifted]
    line.see(values.min().item(), values.max().item())
    low, high = band(iteration, LIFTED_BF16 if bf16 else LIFTED)
    slack = (0.1 if bf16 else 0.01) + rounded * max(made.shape)
    if values.min() < low - slack or values.max() > high + slack:
        line.complain(
            f"singular values {values.min().item():.3f} to {values.max().item():.3f} of the update are not between "
            f"{low:.3f} and {high:.3f}"
        )
    if bf16:
        wanted = u.mT @ orthogonal(direction, iteration) @ vt.mT
        off = ((inside - wanted)[lifted][:, lifted].norm() / wanted[lifted][:, lifted].norm()).item()
        line.plain = max(line.plain, off)
        if off > PLAIN_BF16:
            line.complain(f"is not what muon computes (off by {off:.0e})")


def _beyond(difference: Tensor, rounded: float) -> float:
    """The largest number of a difference, beyond what rounding explains."""
    return max(0.0, difference.abs().max().item() - rounded) if difference.numel() else 0.0
