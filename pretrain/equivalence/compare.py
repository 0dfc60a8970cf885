"""Two trainings side by side: how far they differ, in what, and whether that is rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from parallel.whole import Whole
from pretrain.equivalence.training import Outcome

# Largest difference that sums in another order explain. Updates are compared after steps that have built on each other.
SINGLE = {"loss": 1e-6, "norm": 1e-5, "gradient": 1e-5, "update": 1e-4, "copies": 0.0, "loads": 0.0}
DOUBLE = {"loss": 1e-12, "norm": 1e-12, "gradient": 1e-11, "update": 1e-10, "copies": 0.0, "loads": 0.0}
# Where fp32 shows more, fp64 decides whether it was rounding, unless it was so much that it cannot have been.
DOUBTFUL = 100
# Where a whole tensor should be zero and is rounding instead, that is judged beside the largest number of all tensors.
FLOOR = 1e-5
# An update is the difference of two parameters that are rounded to 6e-8 of themselves: this share of them counts as update.
ROUNDED = 5e-3


class Finding(NamedTuple):
    """The largest difference of one kind, and the tensor (step, router) that shows it. others: how many more are too large."""

    error: float
    where: str = ""
    others: int = 0


class Verdict(NamedTuple):
    """Relative to one rank: loss and gradient norm of any step, gradients of the first, updates of all steps, by tensor and as a
    share of its largest number. copies: between ranks that must hold or compute the same. loads: of experts, in tokens.

    double: the same training in fp64, where fp32 left a doubt."""

    loss: Finding
    norm: Finding
    gradient: Finding
    update: Finding
    copies: Finding
    loads: Finding
    limits: Mapping[str, float] = SINGLE
    double: Verdict | None = None

    @property
    def agrees(self) -> bool:
        return not self.faults() or (self.double is not None and self.double.agrees)

    @property
    def doubtful(self) -> bool:
        """Whether it differs, but may do so by rounding."""
        found = self._asdict()
        return bool(self.faults()) and all(found[kind].error <= DOUBTFUL * limit for kind, limit in self.limits.items())

    def faults(self) -> list[str]:
        """One line for each kind of number that differs."""
        found = self._asdict()
        return [
            f"{kind} of {found[kind].where} differs by {found[kind].error:.0e} (limit {limit:.0e})"
            + (f", and of {found[kind].others} more" if found[kind].others else "")
            for kind, limit in self.limits.items()
            if not found[kind].error <= limit
        ]


def compare(found: Outcome, alone: Outcome, limits: Mapping[str, float] = SINGLE) -> Verdict:
    """How far training on a layout differs from training on one rank. A number that is missing or NaN differs infinitely."""
    gradient, spreads = Finding(0.0), dict(_spreads(found.updates, "update"))
    if found.gradients is not None:
        assert alone.gradients is not None
        gradient = worst(found.gradients, alone.gradients, limits["gradient"])
        spreads |= _spreads(found.gradients, "gradient")
    for rank, norms in enumerate(found.norms):
        spreads[f"gradient norm (rank {rank})"] = _largest([abs(a - b) for a, b in zip(norms, found.norms[0])])
    return Verdict(
        _series("loss", found.losses, alone.losses),
        _series("gradient norm", found.norms[0], alone.norms[0]),
        gradient,
        worst(found.updates, alone.updates, limits["update"], alone.sizes),
        _finding(spreads, 0.0),
        _loads(found, alone.loads[0]),
        limits,
    )


def worst(
    found: Mapping[str, Whole], expected: Mapping[str, Whole], limit: float, sizes: Mapping[str, float] | None = None
) -> Finding:
    """The tensor that differs most. Both: whole tensors by name. sizes: of the numbers whose differences they are."""
    largest = max((_size(tensor) for tensor, _ in expected.values()), default=0.0)
    errors = {}
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            errors[name] = math.inf
            continue
        one, other = found[name].tensor.double(), expected[name].tensor.double()
        scale = max(_size(other), FLOOR * largest, 1e-30) + ROUNDED * (sizes or {}).get(name, 0.0)
        comparable = one.shape == other.shape and math.isfinite(scale)
        errors[name] = _size(one - other) / scale if comparable else math.inf
    return _finding(errors, limit)


def idle(outcome: Outcome) -> list[str]:
    """Parameters whose gradient is zero on one rank: nothing can be said about them."""
    return [name for name, (tensor, _) in (outcome.gradients or {}).items() if not tensor.any()]


def _spreads(tensors: Mapping[str, Whole], what: str) -> dict[str, float]:
    return {f"{what} {name}": spread for name, (_, spread) in tensors.items()}


def _series(what: str, found: list[float], expected: list[float]) -> Finding:
    errors = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found, expected, strict=True)]
    return _finding({f"step {step + 1}": _largest([error]) for step, error in enumerate(errors)}, 0.0)._replace(
        others=0
    )


def _loads(found: Outcome, expected: Mapping[str, list[Tensor]]) -> Finding:
    """Every rank that holds a router must have been told what one rank was."""
    told = {name for rank in found.loads for name in rank}
    errors = {name: 0.0 if name in told else math.inf for name in expected}
    for rank, loads in enumerate(found.loads):
        for name, steps in loads.items():
            other = expected.get(name, [])
            same = len(steps) == len(other)
            off = max((_size(a.double() - b.double()) for a, b in zip(steps, other)), default=0.0) if same else math.inf
            errors[f"{name} (rank {rank})"] = off
    return _finding(errors, 0.0)


def _finding(errors: Mapping[str, float], limit: float) -> Finding:
    if not errors:
        return Finding(0.0)
    where = max(errors, key=lambda name: errors[name])
    beyond = sum(error > limit for error in errors.values())
    return Finding(errors[where], where, max(0, beyond - 1))


def _size(tensor: Tensor) -> float:
    """The largest number, infinite where there is none."""
    return _largest([tensor.abs().max().item()]) if tensor.numel() else 0.0


def _largest(values: list[float]) -> float:
    """NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)
