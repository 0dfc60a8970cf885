"""What a model costs by itself, before anything is spread over ranks: counted once, from its modules on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from parallel.grid import Grid
from pretrain.config import ConfigError, RunConfig
from pretrain.estimate.parameters import Cutting, Parameter, Part, Weighed, of_module, weigh
from pretrain.estimate.stand_in import Product
from pretrain.estimate.trace import Traced, Way, trace
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
    add an auxiliary loss. loads: counts of its routers that are summed after a step.
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
    _traces: dict[tuple[int, Way], Traced] = field(default_factory=dict, repr=False)
    _parts: dict[Cutting, tuple[Part, ...]] = field(default_factory=dict, repr=False)
    _weighed: dict[tuple[Cutting, int, int], Weighed] = field(default_factory=dict, repr=False)
    _flops: dict[float, float] = field(default_factory=dict, repr=False)

    def flops(self, context: float) -> float:
        """Forward FLOPs for one token that sees `context` keys on average."""
        if context not in self._flops:
            self._flops[context] = sum(part.flops_per_token(context) for part in self.block.sublayers())
        return self._flops[context]

    def traced(self, width: int, length: int, way: Way) -> Traced:
        """What a layer keeps, needs, sends and multiplies; tens of milliseconds at the first call with these arguments."""
        if (length, way) not in self._traces:
            self._traces[length, way] = trace(self.block, width, self.state, length, way)
        return self._traces[length, way]

    def parts(self, cutting: Cutting) -> tuple[Part, ...]:
        """What a rank has of each parameter before an engine shards it."""
        if cutting not in self._parts:
            self._parts[cutting] = tuple(parameter.held(cutting) for parameter in self.parameters)
        return self._parts[cutting]

    def weighed(self, cutting: Cutting, ranks: int, keep_whole: int) -> Weighed:
        """Sums over a layer's parameters; see `weigh`."""
        key = cutting, ranks, keep_whole
        if key not in self._weighed:
            self._weighed[key] = weigh(self.parts(cutting), ranks, keep_whole)
        return self._weighed[key]


@dataclass(frozen=True, eq=False)
class ModelCosts:
    """layers: the kind of each layer, in order. extra: the multi-token layer. ends: parameters around the layers."""

    model: Decoder = field(repr=False)
    layers: tuple[Kind, ...]
    extra: Kind | None
    ends: tuple[Parameter, ...] = field(repr=False)
    _plans: dict[object, Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, config: RunConfig) -> ModelCosts:
        """Raises ConfigError for sizes that do not fit, or a vocabulary that is not set."""
        try:
            model = empty(config.model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        kinds: dict[object, Kind] = {}
        state, layers = 0, []
        for name, block in zip(config.model.pattern(), model.layers(), strict=True):
            layers.append(_kind(str(name), block, state, kinds))
            state = layers[-1].state_out
        extra = None
        if model.multi_token is not None:
            extra = _kind(f"multi-token: {config.model.extra_layer()}", model.multi_token.block, state, kinds)
        inside = {id(p) for block in model.layers() for p in block.parameters()}
        inside |= {id(p) for p in model.multi_token.block.parameters()} if model.multi_token is not None else set()
        names = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
        ends = tuple(p for p in of_module(model, splits=model.splits()) if p.name in names)
        return cls(model, tuple(layers), extra, ends)

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.model.active_parameters()

    @cached_property
    def embeddings(self) -> int:
        """Parameters of the embedding and of a head of its own."""
        head = 0 if self.model.head is None else self.model.head.weight.numel()
        return self.model.embedding.weight.numel() + head

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

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of the whole model for one token that sees `context` keys on average."""
        return self.model.flops_per_token(context)

    def head_flops(self, context: float) -> float:
        """Of these, what comes after the last layer: the head, and the multi-token layer with its own pass through it."""
        head = 2.0 * self.vocabulary * self.width
        if self.extra is None:
            return head
        assert self.model.multi_token is not None
        return 2 * head + 2.0 * self.model.multi_token.join.weight.numel() + self.extra.flops(context)

    def plan(self, config: RunConfig, grid: Grid) -> Plan:
        """Which layers form which pipeline stage, as a run cuts them (pretrain/train/layout.py)."""
        from parallel.pipeline.plan import (
            Plan,
        )  # which brings torch's pipelines: half a second that others need not wait

        mesh, length = config.mesh, config.data.sequence_length
        counts = None if mesh.pp_layers is None else tuple(mesh.pp_layers)
        key = (grid.pp, mesh.pp_schedule, mesh.pp_virtual, counts, length)
        if key not in self._plans:
            context = length / 2
            costs, after = [kind.flops(context) for kind in self.layers], self.head_flops(context)
            self._plans[key] = Plan.of(mesh.pp_schedule, grid.pp, costs, 0.0, after, mesh.pp_virtual, mesh.pp_layers)
        return self._plans[key]


def _kind(label: str, block: Block, state: int, kinds: dict[object, Kind]) -> Kind:
    """The kind of a block into which `state` channels of a router's state come."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    key = (label, shapes, state)
    if key not in kinds:
        routes = int(getattr(block.ffn, "router_width", 0))
        out = routes or state
        contextual = isinstance(block.ffn, ContextualFFN)
        loads = sum(module.load.numel() for module in block.modules() if isinstance(module, Balanced))
        active = sum(part.active_parameters() for part in block.sublayers())
        inside = {id(p) for part in block.sublayers() for p in part.parameters()}
        active += sum(p.numel() for p in block.parameters() if id(p) not in inside)
        kinds[key] = Kind(label, block, of_module(block), active, state, out, routes, contextual, loads)
    return kinds[key]
