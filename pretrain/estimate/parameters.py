"""Parameters as an engine sees them: how each is cut over the ranks of its mesh axes, and how many elements a rank then holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from parallel.expert.apply import sparse_layers
from parallel.grid import Grid
from parallel.tensor import units
from pretrain.model.split import Split
from pretrain.optim.adamw import split_by_decay

BYTES = 4  # of a parameter, its gradient, and each of its two moments: all fp32


@dataclass(frozen=True)
class Cutting:
    """What of a grid decides how parameters are cut."""

    tp: int = 1
    ep: int = 1
    expert_tensor: bool = False

    @classmethod
    def of(cls, grid: Grid) -> Cutting:
        return cls(grid.tp, grid.ep, grid.expert_tensor)


@dataclass(frozen=True)
class Parameter:
    """name: in the whole model. unit: how the tensor-parallel unit that owns it is cut, over tp. expert: how its sparse layer's
    experts are, over ep and over tp; None for no expert's. decays: which of the optimizer's groups it is in."""

    name: str
    shape: tuple[int, ...]
    unit: Split | None
    expert: tuple[Split, ...] | None
    decays: bool

    def cuts(self, cutting: Cutting) -> list[tuple[Split, int]]:
        """(split, into how many parts), as parallel/tensor.py and parallel/expert/apply.py do it."""
        if self.unit is not None and cutting.tp > 1:
            return [(self.unit, cutting.tp)]
        sizes = {"ep": cutting.ep, "tp": cutting.tp if cutting.expert_tensor else 1}
        return [(split, sizes[split.axis]) for split in self.expert or () if sizes[split.axis] > 1]

    def held(self, cutting: Cutting) -> Part:
        """What a rank has of it before an engine shards it."""
        shape, copied, spread = list(self.shape), 0, False
        cuts = self.cuts(cutting)
        for split, ranks in cuts:
            pieces = split.pieces(0, ranks)
            shape[split.dim] = sum(piece.length for piece in pieces)
            spread |= split.axis == "ep"
        elements = math.prod(shape)
        for split, ranks in cuts:
            for piece in split.pieces(0, ranks):
                if piece.copies > 1:
                    # All different blocks side by side, of which the rank has one (parallel/gradients.py).
                    copied += elements // shape[split.dim] * piece.length * (ranks // piece.copies)
        return Part(elements, shape[0] if shape else 1, bool(cuts), spread, copied, self.decays)


@dataclass(frozen=True)
class Part:
    """elements, rows: of a rank's tensor, and of its first dim. cut: over tp or ep. spread: over ep, so that the engine leaves it
    alone. copied: elements of the sums over tp ranks that hold copies of a block (key heads that serve several ranks)."""

    elements: int
    rows: int
    cut: bool
    spread: bool
    copied: int
    decays: bool

    def padded(self, ranks: int) -> int:
        """Elements when FSDP2 has filled the first dim up to a multiple of `ranks`."""
        return self.elements if ranks == 1 else -(-self.rows // ranks) * ranks * (self.elements // self.rows)

    def shard(self, ranks: int) -> int:
        """Elements on the first of `ranks` ranks, which has no fewer than any other."""
        return self.padded(ranks) // ranks


def of_module(module: nn.Module, prefix: str = "", splits: dict[str, Split] | None = None) -> tuple[Parameter, ...]:
    """Every parameter of a block, or of the parts of a model around its blocks, once. splits: those of the model itself."""
    unit_splits: dict[str, Split] = dict(splits or {})
    expert_splits: dict[str, tuple[Split, ...]] = {}
    for name, unit in units(module):
        unit_splits |= {_join(name, own): split for own, split in unit.splits().items() if split.axis == "tp"}
    for name, layer in sparse_layers(module):
        cuttable: dict[str, tuple[Split, ...]] = _expert_splits(layer)
        expert_splits |= {_join(name, own): each for own, each in cuttable.items()}
    decayed = {id(parameter) for parameter in split_by_decay(module)[0]}
    return tuple(
        Parameter(
            _join(prefix, name),
            tuple(parameter.shape),
            unit_splits.get(name),
            expert_splits.get(name),
            id(parameter) in decayed,
        )
        for name, parameter in module.named_parameters()
    )


def _expert_splits(layer: Any) -> dict[str, tuple[Split, ...]]:
    try:
        found: dict[str, tuple[Split, ...]] = layer.expert_splits()
    except ValueError:  # experts that must stay together: no layout that cuts them passes the checks
        return {}
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def buckets(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Bytes of the buckets into which tensors of these bytes are joined: full as soon as one reaches the limit."""
    held = 0
    for size in sizes:
        held += size
        if held >= limit:
            yield held
            held = 0
    if held:
        yield held


def total(parts: Sequence[Part]) -> int:
    return sum(part.elements for part in parts)
