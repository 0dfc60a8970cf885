"""What a model costs by itself, before anything is spread over ranks: counted once, from its modules on the meta device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from parallel.grid import Grid
from pretrain.config import ConfigError, RunConfig
from pretrain.estimate.book import Book, key
from pretrain.estimate.flops import Forward, per_token
from pretrain.estimate.parameters import BYTES, Cutting, Parameter, Part, Weighed, of_module, weigh
from pretrain.estimate.stand_in import Product
from pretrain.estimate.trace import Traced, Way, trace
from pretrain.estimate.update import matrices
from pretrain.model.block import Block
from pretrain.model.decoder import Decoder
from pretrain.model.files import empty
from pretrain.model.router import Balanced
from pretrain.model.sublayer import ContextualFFN

if TYPE_CHECKING:
    from parallel.pipeline.plan import Plan

__all__ = ["Kind", "ModelCosts", "Product", "Way"]


@dataclass(eq=False)
class Kind:
    """Layers that are alike. label: the names of the sublayers.

    state: channels of the router's state that comes in, 0 for none; state_out: that goes out; routes: of its own. contextual: may
    add an auxiliary loss. loads: counts of its routers that are summed after a step. first: the number of the first such layer,
    -1 for the multi-token layer. book: of traces that were made before.
    """

    label: str
    block: Block = field(repr=False)
    parameters: tuple[Parameter, ...] = field(repr=False)
    active: int
    state: int
    state_out: int
    routes: int
    contextual: bool
    loads: int
    first: int
    book: Book | None = field(default=None, repr=False)
    _traces: dict[tuple[int, Way], Traced] = field(default_factory=dict, repr=False)
    _parts: dict[Cutting, tuple[Part, ...]] = field(default_factory=dict, repr=False)
    _weighed: dict[tuple[Cutting, int, int], Weighed] = field(default_factory=dict, repr=False)
    _flops: dict[tuple[int, str | None], Forward] = field(default_factory=dict, repr=False)

    def forward(self, length: int, only: str | None = None) -> Forward:
        """FLOPs of its forward pass, or of one sublayer's (mixer, ffn), for one token of a document of so many, on average."""
        if (length, only) not in self._flops:
            own = None if only is None else getattr(self.block, only)
            parts = self.block.sublayers() if only is None else () if own is None else (own,)
            self._flops[length, only] = Forward.sum(per_token(part, length) for part in parts)
        return self._flops[length, only]

    def traced(self, width: int, length: int, way: Way) -> Traced:
        """What a layer keeps, needs, sends and multiplies; tens of milliseconds at the first call with these arguments."""
        if (length, way) not in self._traces:
            book = self.book if way.gpu else None
            name = key(self.first, width, length, way)
            found = None if book is None else book.find(name)
            self._traces[length, way] = found or trace(self.block, width, self.state, length, way)
            if book is not None and found is None:
                book.add(name, self._traces[length, way])
        return self._traces[length, way]

    def parts(self, cutting: Cutting) -> tuple[Part, ...]:
        """What a rank has of each parameter before an engine shards it."""
        if cutting not in self._parts:
            self._parts[cutting] = tuple(parameter.held(cutting) for parameter in self.parameters)
        return self._parts[cutting]

    def weighed(self, cutting: Cutting, ranks: int, keep_whole: int) -> Weighed:
        """Sums over a layer's parameters; see `weigh`."""
        shared = cutting, ranks, keep_whole
        if shared not in self._weighed:
            self._weighed[shared] = weigh(self.parts(cutting), ranks, keep_whole)
        return self._weighed[shared]


@dataclass(frozen=True, eq=False)
class ModelCosts:
    """optimizer: its configuration. layers: the kind of each layer, in order. extra: the multi-token layer. ends: parameters
    around the layers."""

    model: Decoder = field(repr=False)
    optimizer: Any
    layers: tuple[Kind, ...]
    extra: Kind | None
    ends: tuple[Parameter, ...] = field(repr=False)
    _plans: dict[object, Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: RunConfig, book: Book | None = None) -> ModelCosts:
        """book: of traces of this model. Raises ConfigError for sizes that do not fit, or a vocabulary that is not set."""
        try:
            with _Undrawn():
                model = empty(config.model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            found = matrices(config.optimizer, model)
        except ValueError as error:
            raise ConfigError(f"optimizer.adamw: {error}") from None
        of = partial(of_module, optimizer=config.optimizer, matrices=found)
        kinds: dict[object, Kind] = {}
        state, layers = 0, []
        for number, (name, block) in enumerate(zip(config.model.pattern(), model.layers(), strict=True)):
            layers.append(_kind(str(name), block, of(block, prefix=f"blocks.{number}"), state, number, kinds, book))
            state = layers[-1].state_out
        extra = None
        if model.multi_token is not None:
            block = model.multi_token.block
            parameters = of(block, prefix="multi_token.block")
            extra = _kind(f"multi-token: {config.model.extra_layer()}", block, parameters, state, -1, kinds, book)
        inside = {id(p) for block in model.layers() for p in block.parameters()}
        inside |= {id(p) for p in model.multi_token.block.parameters()} if model.multi_token is not None else set()
        names = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
        ends = tuple(p for p in of(model, splits=model.splits()) if p.name in names)
        return cls(model, config.optimizer, tuple(layers), extra, ends)

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def state_bytes(self) -> float:
        """Of all weights and of what the optimizer keeps for them: a checkpoint."""
        layers = [*self.layers, *([self.extra] if self.extra is not None else [])]
        every = [*self.ends, *(parameter for kind in layers for parameter in kind.parameters)]
        return float(sum(BYTES * (1 + each.moments) * math.prod(each.shape) for each in every))

    @cached_property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.model.active_parameters()

    @cached_property
    def embeddings(self) -> int:
        """Parameters of the embedding and of a head of its own."""
        head = 0 if self.model.head is None else self.model.head.weight.numel()
        return self.model.embedding.weight.numel() + head

    def matrices(self, layers: Iterable[Kind], last: bool) -> Counter[tuple[int, int]]:
        """Sizes of the matrices that the optimizer orthogonalises: of these layers, and of what comes after the last ones."""
        every = [parameter for kind in layers for parameter in kind.parameters]
        if last:
            every += [*self.ends, *(self.extra.parameters if self.extra is not None else ())]
        return Counter(size for parameter in every for size in parameter.matrices)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Each kind of layer once, in the order in which they come."""
        return tuple(dict.fromkeys(self.layers))

    @property
    def width(self) -> int:
        return self.model.config.width

    @property
    def vocabulary(self) -> int:
        return self.model.embedding.num_embeddings

    def forward(self, length: int) -> Forward:
        """FLOPs of the whole model's forward pass for one token of a document of so many, on average."""
        layers = [kind.forward(length).times(count) for kind, count in Counter(self.layers).items()]
        return Forward.sum([*layers, self.after(length)])

    def after(self, length: int) -> Forward:
        """Of these, what comes after the last layer: the head, and the multi-token layer with its own pass through it."""
        head = 2.0 * self.vocabulary * self.width
        if self.extra is None:
            return Forward(head)
        assert self.model.multi_token is not None
        join = 2.0 * self.model.multi_token.join.weight.numel()
        return Forward.sum([self.extra.forward(length), Forward(2 * head + join)])

    def plan(self, config: RunConfig, grid: Grid) -> Plan:
        """Which layers form which pipeline stage, as a run cuts them (pretrain/train/layout.py)."""
        from parallel.pipeline.plan import (
            Plan,
        )  # which brings torch's pipelines: half a second that others need not wait

        mesh, length = config.mesh, config.data.sequence_length
        counts = None if mesh.pp_layers is None else tuple(mesh.pp_layers)
        cut = (grid.pp, mesh.pp_schedule, mesh.pp_virtual, counts, length)
        if cut not in self._plans:
            costs, before, after = self.model.costs(length / 2)
            self._plans[cut] = Plan.of(mesh.pp_schedule, grid.pp, costs, before, after, mesh.pp_virtual, mesh.pp_layers)
        return self._plans[cut]


class _Undrawn(TorchFunctionMode):
    """Within it, nothing is drawn on the meta device, where there is nothing to fill: torch would, by code of its compiler, whose
    import takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")  # by a method, or by torch.nn.init
        if getattr(func, "__name__", "") in ("normal_", "uniform_") and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **(kwargs or {}))


def _kind(
    label: str,
    block: Block,
    parameters: tuple[Parameter, ...],
    state: int,
    number: int,
    kinds: dict[object, Kind],
    book: Book | None,
) -> Kind:
    """The kind of a block with these parameters into which `state` channels of a router's state come."""
    like = (label, parameters, state)
    if like not in kinds:
        routes = int(getattr(block.ffn, "router_width", 0))
        out = routes or state
        contextual = isinstance(block.ffn, ContextualFFN)
        loads = sum(module.load.numel() for module in block.modules() if isinstance(module, Balanced))
        active = sum(part.active_parameters() for part in block.sublayers())
        inside = {id(p) for part in block.sublayers() for p in part.parameters()}
        active += sum(p.numel() for p in block.parameters() if id(p) not in inside)
        kinds[like] = Kind(label, block, parameters, active, state, out, routes, contextual, loads, number, book)
    return kinds[like]
