"""What a model costs by itself, before anything is spread over ranks: counted once, from the modules on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from pretrain.config import RunConfig
from pretrain.model.decoder import Decoder
from pretrain.model.files import empty


@dataclass(frozen=True)
class Product:
    """A kind of matrix product in the forward pass: `rows` rows for each token (k / E for one of E experts), [n, k]; `count` of
    them in the layer. cut: the dim that tensor parallelism cuts, "n", "k" or None; expert: over experts' ranks."""

    what: str
    rows: float
    n: int
    k: int
    count: int
    cut: str | None
    expert: bool


@dataclass(frozen=True)
class LayerCosts:
    """A layer. flops: forward FLOPs of a token that sees `context` keys on average."""

    label: str
    parameters: int
    active: int
    products: tuple[Product, ...]
    flops: Callable[[float], float] = field(repr=False)


@dataclass(frozen=True)
class ModelCosts:
    """layers: one for each layer, alike ones the same object. ends: embedding, norm, head and multi-token layer."""

    model: Decoder = field(repr=False)
    layers: tuple[LayerCosts, ...]

    @classmethod
    def of(cls, config: RunConfig) -> ModelCosts:
        """Raises ValueError for sizes that do not fit, or a vocabulary that is not set."""
        model = empty(config.model)
        layers = tuple(
            LayerCosts(
                str(name),
                sum(parameter.numel() for parameter in block.parameters()),
                sum(part.active_parameters() for part in block.sublayers()),
                (),
                lambda context, block=block: sum(part.flops_per_token(context) for part in block.sublayers()),
            )
            for name, block in zip(config.model.pattern(), model.layers(), strict=True)
        )
        return cls(model, layers)

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.model.active_parameters()

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of the whole model for one token that sees `context` keys on average."""
        return self.model.flops_per_token(context)
