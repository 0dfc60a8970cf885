"""What all ranks of a job have in common, and which part of the model one pipeline stage holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.estimate.model import Kind, ModelCosts, Way
from pretrain.estimate.parameters import Parameter, Part, Weighed
from pretrain.estimate.trace import Measured, Traced

FINAL = ("norm.", "head.", "multi_token.")
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What all ranks of a job have in common. tokens: of a micro-batch that one rank's mixers see."""

    model: ModelCosts
    config: RunConfig
    grid: Grid
    way: Way
    tokens: int
    micro_batches: int
    ranks_per_node: int
    _traced: dict[Kind, Traced] = field(default_factory=dict, repr=False)
    _measured: dict[Kind, Measured] = field(default_factory=dict, repr=False)
    _weighed: dict[Kind, Weighed] = field(default_factory=dict, repr=False)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config.data.sequence_length

    def traced(self, kind: Kind) -> Traced:
        if kind not in self._traced:
            self._traced[kind] = kind.traced(self.model.width, self.length, self.way)
        return self._traced[kind]

    def measured(self, kind: Kind) -> Measured:
        if kind not in self._measured:
            self._measured[kind] = self.traced(kind).measured(self.tokens)
        return self._measured[kind]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    @cached_property
    def sharers(self) -> tuple[int, int]:
        """(ranks that share out parameters, elements below which ZeRO stage 3 does not)."""
        engine = self.config.engine
        if engine.kind == "deepspeed":
            return self.grid.world, engine.keep_whole
        return self.grid.size("shard_cp"), 0

    def weighed(self, kind: Kind) -> Weighed:
        if kind not in self._weighed:
            self._weighed[kind] = kind.weighed(self.way.cutting, *self.sharers)
        return self._weighed[kind]

    @cached_property
    def low(self) -> int:
        """Bytes of an element of the matrix products."""
        return 2 if self.way.bf16 else 4

    def extent(self, axis: str) -> tuple[int, int]:
        """(ranks, how many of them share a node) of a group. axis: of the grid, or world."""
        size, stride = (self.grid.world, 1) if axis == "world" else self.grid.extent(axis)
        return size, max(1, min(size, self.ranks_per_node // stride))


@dataclass(frozen=True)
class Held:
    """The layers of one stage. number: of the stage, of `stages`. at: the number of its first layer."""

    kinds: tuple[Kind, ...]
    number: int
    stages: int
    at: int

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.stages - 1

    @cached_property
    def counts(self) -> Counter[Kind]:
        return Counter(self.kinds)


def ends(setting: Setting, held: Held) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parameters (before, after) the layers of a stage."""
    before, after = around(setting.model, held)
    return tuple(p.held(setting.way.cutting) for p in before), tuple(p.held(setting.way.cutting) for p in after)


def around(model: ModelCosts, held: Held) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...]]:
    """As `ends`, before they are cut."""
    before = tuple(p for p in model.ends if not p.name.startswith(FINAL)) if held.first else ()
    after: tuple[Parameter, ...] = ()
    if held.last:
        after = tuple(p for p in model.ends if p.name.startswith(FINAL))
        after += model.extra.parameters if model.extra is not None else ()
        if not held.first and doubled(model):
            after = (next(p for p in model.ends if p.name == "embedding.weight"), *after)
    return before, after


def doubled(model: ModelCosts) -> bool:
    """Whether the last stage of a pipeline has a copy of the embedding."""
    return model.model.head is None or model.extra is not None
