"""The two contracts of a layer: a mixer (moves information along the sequence) and an FFN (works on each token alone).

A newcomer adds a mixer by adding one file to `mixers/`: a config class with a unique `kind` and a `build`, and its module.
The file is found by itself; nothing else needs to know it.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from parallel.config import Strict
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Split, check_fit


class SublayerConfig(Strict):
    """What mixers' and FFNs' configs share. Subclasses add `kind: Literal["..."]` and implement build."""

    def build(self, width: int) -> nn.Module:
        """The module for a residual stream of `width` channels. Raises ValueError for sizes that do not fit."""
        raise NotImplementedError


class Carry(NamedTuple):
    """What goes from layer to layer besides the residual stream: plain tensors, so that a layer stays a function of its inputs.

    router_state: [B, T, R], the previous routing layer's state where routers average over depth; None before the first.
    auxiliary: fp32 scalar, the auxiliary losses so far in nats, summed over the tokens of this call; None when there is none.
    """

    router_state: Tensor | None = None
    auxiliary: Tensor | None = None

    def add(self, loss: Tensor) -> Carry:
        """With one more auxiliary loss (nats, summed over tokens)."""
        return self._replace(auxiliary=loss if self.auxiliary is None else self.auxiliary + loss)

    def apart(self, given: Carry) -> Carry:
        """With copies of what a layer was `given` and passes on as it is.

        An engine hangs its hooks on what a layer returns; FSDP2 hands a layer views, on which it would hang them in vain.
        """
        return Carry(
            *(ours.clone() if ours is not None and ours is theirs else ours for ours, theirs in zip(self, given))
        )


class Sublayer(nn.Module):
    """What the decoder asks of any sublayer.

    A module with weight matrices outside nn.Linear and nn.Embedding has `init_weights(std)`, which the decoder calls.
    """

    owns_residual = False  # True: the module normalises its input and adds the residual itself (Hourglass)
    # Why this sublayer must see whole sequences; None where it reaches along them by its SequenceContext alone.
    whole_sequence: str | None = None
    # True: what it remembers of the past while generating has a fixed shape, the keys and values of `attend` aside.
    fixed_memory = True
    reads_wide = False  # True: under autocast the first thing done to x is not a product in the low precision

    def place(self, index: int, count: int) -> None:
        """Called once, before the weights are drawn: this is number `index` of the `count` sublayers of its kind."""

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs for one token (a multiply-add counts 2), `context` being the mean number of keys it can see."""
        raise NotImplementedError

    def active_parameters(self) -> int:
        """Parameters that one token's forward pass touches."""
        return sum(parameter.numel() for parameter in self.parameters())

    def output_projections(self) -> list[Tensor]:
        """Weights that write to the residual stream: their initial scale shrinks with depth."""
        raise NotImplementedError

    def splits(self) -> dict[str, Split]:
        """How the whole module's parameters are cut into parts whose outputs add up to its own; those not named stay whole."""
        return {}

    def part(self, rank: int, ranks: int) -> Self:
        """A module of the same class with the parameters of part `rank` of `ranks`. Raises ValueError if it cannot be cut so."""
        splits = self.splits()
        check_fit(list(splits.values()), ranks)
        pieces: dict[int, Any] = {}
        for name, split in splits.items():
            whole = self.get_parameter(name)
            pieces[id(whole)] = nn.Parameter(split.take(whole.detach(), rank, ranks), whole.requires_grad)
        part = copy.deepcopy(self, pieces)  # which takes the pieces for copies already made
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        part.shrink(rank, ranks)
        return part

    def shrink(self, rank: int, ranks: int) -> None:
        """Sets sizes and counts to those of part `rank` of `ranks`; its parameters are in place."""

    def across(self, x: Tensor) -> Tensor:
        """The sum of x over all parts, for what every part needs of all. Replaced from outside where there are parts."""
        return x


class Mixer(Sublayer):
    @property
    def reach(self) -> int:
        """How many tokens back its convolutions look. A part of a sequence that has fewer cannot tell the next part enough."""
        conv = getattr(self, "conv", None)
        return 0 if conv is None else conv.shape[1] - 1

    moves_along_sequence = True

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. With a cache, T tokens follow those that the cache has seen, and it is updated in place."""
        raise NotImplementedError


class FFN(Sublayer):
    """x [B, T, D] -> [B, T, D]; every token by itself. A `contextual` one subclasses ContextualFFN instead."""

    contextual = False

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ContextualFFN(Sublayer):
    """A channel sublayer that needs more than a token's own channels: its router's state, its sequence, a balancing loss."""

    contextual = True

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        """x [B, T, D] -> ([B, T, D], the carry for the next layer). With a cache, as for a mixer."""
        raise NotImplementedError


class MixerConfig(SublayerConfig):
    """Base of the mixers' configs."""

    def build(self, width: int) -> Mixer:
        raise NotImplementedError


class FFNConfig(SublayerConfig):
    """Base of the FFNs' configs."""

    def build(self, width: int) -> FFN | ContextualFFN:
        raise NotImplementedError


def linear_flops(*weights: Tensor) -> float:
    """Forward FLOPs per token of dense projections with these weights."""
    return sum(2.0 * weight.numel() for weight in weights)


def by_kind(package: str, base: type[SublayerConfig]) -> Any:
    """The union of all config classes in a package, chosen by `kind`. Imports every module of the package."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")
    kinds = {config.model_fields["kind"].default: config for config in base.__subclasses__()}

    def kind_of(value: Any) -> str | None:
        return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)

    members = tuple(Annotated[config, Tag(kind)] for kind, config in sorted(kinds.items()))
    union: Any = members[0]
    for member in members[1:]:
        union = union | member
    return Annotated[union, Discriminator(kind_of)]


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds: for sizes that do not fit each other."""
    if not condition:
        raise ValueError(message)


@torch.no_grad()
def init_normal(module: nn.Module, std: float) -> None:
    """Normal weights for every matrix, zero biases; parameters with their own law reset themselves afterwards."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            child.weight.normal_(0.0, std)
            bias = getattr(child, "bias", None)
            if isinstance(bias, Tensor):
                bias.zero_()
