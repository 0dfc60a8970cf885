"""Parameters as an engine sees them: how each is cut over the ranks of its mesh axes, and how many elements a rank then holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from parallel.engines.placement import dim_to_cut
from parallel.expert.apply import sparse_layers
from parallel.grid import Grid
from parallel.tensor import units
from pretrain.estimate.update import moments
from pretrain.model.split import Split
from pretrain.optim.adamw import split_by_decay
from pretrain.optim.matrices import Described

BYTES = 4  # of a parameter, of its gradient, and of each element that an optimizer keeps for it: all fp32


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
    experts are, over ep and over tp; None for no expert's. decays: which of the optimizer's groups it is in. moments: elements
    that the optimizer keeps for each of its own. matrices: (rows, columns) of those that it orthogonalises."""

    name: str
    shape: tuple[int, ...]
    unit: Split | None
    expert: tuple[Split, ...] | None
    decays: bool
    moments: int
    matrices: tuple[tuple[int, int], ...]

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
        orthogonal = bool(self.matrices)
        return Part(elements, tuple(shape), bool(cuts), spread, copied, self.decays, self.moments, orthogonal)


@dataclass(frozen=True)
class Part:
    """elements, shape: of a rank's tensor. cut: over tp or ep. spread: over ep, so that the engine leaves it alone.

    copied: elements of the sums over tp ranks that hold copies of a block (key heads that serve several ranks).
    """

    elements: int
    shape: tuple[int, ...]
    cut: bool
    spread: bool
    copied: int
    decays: bool
    moments: int
    orthogonalised: bool

    def padded(self, ranks: int) -> int:
        """Elements when FSDP2 has filled the dim that it cuts up to a multiple of `ranks`."""
        if ranks == 1 or not self.shape:
            return self.elements
        size = self.shape[dim_to_cut(self.shape, ranks)]
        return -(-size // ranks) * ranks * (self.elements // size)

    def shard(self, ranks: int) -> int:
        """Elements on the first of `ranks` ranks, which has no fewer than any other."""
        return self.padded(ranks) // ranks


def of_module(
    module: nn.Module, optimizer: Any, matrices: Described, prefix: str = "", splits: dict[str, Split] | None = None
) -> tuple[Parameter, ...]:
    """Every parameter of a block, or of the parts of a model around its blocks, once.

    matrices: of the whole model (update.py), in which the module's parameters have the prefix. splits: those of the model itself.
    """
    unit_splits: dict[str, Split] = dict(splits or {})
    expert_splits: dict[str, tuple[Split, ...]] = {}
    for name, unit in units(module):
        unit_splits |= {_join(name, own): split for own, split in unit.splits().items() if split.axis == "tp"}
    for name, layer in sparse_layers(module):
        cuttable: dict[str, tuple[Split, ...]] = _expert_splits(layer)
        expert_splits |= {_join(name, own): each for own, each in cuttable.items()}
    decayed = {id(parameter) for parameter in split_by_decay(module)[0]}
    own = {name: matrices.get(_join(prefix, name), ()) for name, _ in module.named_parameters()}
    return tuple(
        Parameter(
            name,
            tuple(parameter.shape),
            unit_splits.get(name),
            expert_splits.get(name),
            id(parameter) in decayed,
            moments(optimizer, bool(own[name])),
            tuple((matrix.outputs, matrix.inputs) for matrix in own[name]),
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


def buckets(sizes: Iterable[float], limit: int) -> Iterator[float]:
    """Bytes of the buckets into which tensors of these bytes are joined: full as soon as one reaches the limit."""
    held = 0.0
    for size in sizes:
        held += size
        if held >= limit:
            yield held
            held = 0
    if held:
        yield held


@dataclass(frozen=True)
class Weighed:
    """Sums over the parameters of a layer, in elements, for `ranks` ranks that share them out.

    whole: those that are not spread over ep; padded: of these, filled up as FSDP2 does; shard: of these, a rank's. spread: those
    that are spread. updated: what a rank updates, (decayed, not decayed). flat: whole ones, (decayed, not decayed). partitioned:
    every parameter cut by ZeRO stage 3, filled up; small: of these, what it leaves whole, and small_exact without filling.
    Of what a rank updates, moments: elements of the optimizer's state; orthogonalised: in matrices; largest: parameter.
    sums: of each parameter by itself, what is summed over data-parallel ranks; over_tp, over_edp: over tp and edp ranks.
    """

    whole: int
    padded: int
    shard: int
    spread: int
    updated: tuple[int, int]
    flat: tuple[int, int]
    partitioned: int
    small: int
    small_exact: int
    moments: int
    orthogonalised: int
    largest: int
    sums: tuple[int, ...]
    over_tp: tuple[float, ...]
    over_edp: tuple[int, ...]


def weigh(parts: Sequence[Part], ranks: int, keep_whole: int) -> Weighed:
    """keep_whole: ZeRO stage 3 leaves parameters with fewer elements whole."""
    own, spread = [part for part in parts if not part.spread], [part for part in parts if part.spread]

    held = {id(part): part.elements if part.spread else part.shard(ranks) for part in parts}

    def updated(decays: bool) -> int:
        return sum(held[id(part)] for part in parts if part.decays == decays)

    def cut(part: Part) -> int:
        return -(-part.elements // ranks) * ranks

    return Weighed(
        whole=sum(part.elements for part in own),
        padded=sum(part.padded(ranks) for part in own),
        shard=sum(part.shard(ranks) for part in own),
        spread=sum(part.elements for part in spread),
        updated=(updated(True), updated(False)),
        flat=(sum(p.elements for p in own if p.decays), sum(p.elements for p in own if not p.decays)),
        partitioned=sum(map(cut, parts)),
        small=sum(cut(part) for part in parts if part.elements < keep_whole),
        small_exact=sum(part.elements for part in parts if part.elements < keep_whole),
        moments=sum(part.moments * held[id(part)] for part in parts),
        orthogonalised=sum(held[id(part)] for part in parts if part.orthogonalised),
        largest=max(held.values(), default=0),
        sums=tuple(part.elements for part in own),
        over_tp=tuple(
            part.copied / ranks if part.cut else float(part.shard(ranks)) for part in own if not part.cut or part.copied
        ),
        over_edp=tuple(part.elements for part in spread),
    )


def join(several: Iterable[Weighed]) -> Weighed:
    """The sums of several layers as those of one."""
    items = list(several)
    added: dict[str, Any] = {}
    for each in fields(Weighed):
        values = [getattr(item, each.name) for item in items]
        if each.name in ("updated", "flat"):
            added[each.name] = tuple(map(sum, zip(*values)))
        elif each.name == "largest":
            added[each.name] = max(values)
        else:
            added[each.name] = tuple(itertools.chain(*values)) if isinstance(values[0], tuple) else sum(values)
    return Weighed(**added)
