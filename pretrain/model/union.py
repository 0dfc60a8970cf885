"""Routing of a union of experts (arXiv 2503.02495): which shards of a dense block each token uses, in two levels.

    expert selection: the experts that a patch of tokens may use, from the mean of its sequence up to the patch
    data selection:   the tokens (or patches) that an allowed expert takes: each token's top k, or all above a threshold

Every rule is causal: a choice depends on the token itself and on earlier ones only. (The released code ranks tokens against
later ones.) A choice is made by sequence, and goes on across calls that share a cache.

A selected expert's output counts once, unweighted: all experts together are the dense block. The routers learn through a
factor g / stopgrad(g) on the output, whose value is 1 and whose gradient is that of log g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from parallel.config import Strict
from pretrain.model.quantiles import Quantiles
from pretrain.model.router import Balanced, Gate, unreduced
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import require


class RoutingConfig(Strict):
    """What the feed-forward union and selective attention have in common."""

    select: Literal["token_choice", "threshold", "all"] = "token_choice"
    """How experts take tokens: each token's top_k experts, every token whose score passes the expert's threshold, or all."""
    top_k: int | None = Field(None, ge=1)
    """token_choice: experts of each token."""
    mean_load: float | None = Field(None, gt=0, le=1)
    """threshold: the share of all tokens that an expert takes on average."""
    patch: int = Field(1, ge=1)
    """Tokens selected together. Above 1 a patch is routed by the mean of everything before it and of its first token."""
    expert_select: Literal["none", "prefix"] = "none"
    """prefix: the mean of the sequence so far decides which experts may be used at all."""
    kept: int | None = Field(None, ge=1)
    """prefix: experts that may be used."""
    expert_patch: int = Field(1, ge=1)
    """prefix: tokens between two such decisions."""
    capacity: int | None = Field(None, ge=1)
    """Tokens of one sequence that an expert takes at most, the earliest ones; no limit when left out."""
    gate: Gate = "softmax"
    """How router logits become scores."""
    router_gradient: Literal["straight_through", "mean_one", "none"] = "straight_through"
    """straight_through: factors of value 1 that carry the routers' gradient. mean_one: real gates g, scaled to a mean of 1
    over the token's experts; equal to the dense block only where they are uniform. none: the routers stay as drawn."""
    bias_rate: float = Field(1e-3, ge=0)
    """How far the balancing biases of top-k choices move after each step; 0 turns balancing off."""
    threshold_rate: float = Field(0.1, gt=0, le=1)
    """threshold: weight of a step's quantile in the running mean."""

    def routing(self, width: int, experts: int) -> Routing:
        """The routers for a stream of `width` channels. Raises ValueError for settings that do not fit each other."""
        _check(self, experts)
        return Routing(width, experts, self)


class Level(NamedTuple):
    """One router's answer: mask bool and log_gate (logarithms of its scores, fp32) [B, T, n]; indices int64 [B, T, k] or None."""

    mask: Tensor
    log_gate: Tensor
    indices: Tensor | None


class Selection(NamedTuple):
    """mask: bool [B, T, n], who takes what. factor: fp32 [B, T, n], multiplies outputs where the mask is set.

    indices: int64 [B, T, k], the same as the mask where all tokens have equally many experts, else None.
    """

    mask: Tensor
    factor: Tensor
    indices: Tensor | None
    levels: tuple[Level, ...]

    def of(self, experts: slice) -> Selection:
        """For a module that holds some of the experts only."""
        return Selection(self.mask[..., experts], self.factor[..., experts], None, self.levels)

    def imbalance(self, reduce_load: Callable[[Tensor], Tensor] = unreduced) -> Tensor:
        """Switch loss n sum_i f_i P_i (Fedus et al. 2021, arXiv 2101.03961), summed over levels: 1 each when even; fp32 scalar.

        f: shares of the choices, P: mean shares of the scores, over the tokens of the call; f over more by reduce_load.
        """
        losses = []
        for mask, log_gate, _ in self.levels:
            chosen = reduce_load(mask.flatten(0, 1).sum(0)).to(log_gate.dtype)
            shares = log_gate.softmax(-1).flatten(0, 1).mean(0)
            losses.append(mask.shape[-1] * (chosen / chosen.sum().clamp(min=1) * shares).sum())
        return torch.stack(losses).sum()


class Routing(nn.Module):
    """x [B, T, D] -> Selection. Without routers (select = all, expert_select = none) every token uses every expert."""

    def __init__(self, width: int, experts: int, config: RoutingConfig):
        super().__init__()
        self.experts, self.capacity, self.gradient = experts, config.capacity, config.router_gradient
        self.mean_share = _share(config, experts)
        self.expert_router: UnionRouter | None = None
        self.data_router: UnionRouter | None = None
        if config.expert_select == "prefix":
            assert config.kept is not None
            self.expert_router = TopK(width, experts, config.gate, config.expert_patch, config.kept, config.bias_rate)
        patch = config.patch if config.patch > 1 else None
        if config.select == "token_choice":
            assert config.top_k is not None
            self.data_router = TopK(width, experts, config.gate, patch, config.top_k, config.bias_rate)
        elif config.select == "threshold":
            assert config.mean_load is not None
            self.data_router = Threshold(width, experts, config.gate, patch, config.mean_load, config.threshold_rate)

    def forward(self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None = None) -> Selection:
        levels: list[Level] = []
        mask, indices = None, None
        for name, router in (("expert", self.expert_router), ("data", self.data_router)):
            if router is not None:
                levels.append(router(x, sequence, cache, name, mask))
                mask, indices = levels[-1].mask, levels[-1].indices
        if mask is None:
            every = torch.arange(self.experts, device=x.device).expand(*x.shape[:2], -1)
            mask, indices = torch.ones_like(every, dtype=torch.bool), every
        if self.capacity is not None:
            mask, indices = first_come(mask, self.capacity, sequence, cache), None
        return Selection(mask, self._factor(mask, levels, x), indices, tuple(levels))

    def silence(self) -> None:
        """Its routers count no load: another part's, which see the same tokens, do."""
        for module in self.modules():
            if isinstance(module, Balanced):
                module.counting = False

    @property
    def whole_sequence(self) -> str | None:
        """As for sublayers: why the routing cannot work on a part of a sequence, None where it can."""
        if any(router is not None and router.patch is not None for router in (self.expert_router, self.data_router)):
            return "tokens are routed by the mean of what came before (patch above 1, or expert_select=prefix)"
        return None if self.capacity is None else "capacity counts the tokens of a sequence from its beginning"

    def _factor(self, mask: Tensor, levels: list[Level], x: Tensor) -> Tensor:
        if not levels or self.gradient == "none":
            return torch.ones(mask.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        log_gate = torch.stack([level.log_gate for level in levels]).sum(0)
        if self.gradient == "straight_through":
            return (log_gate - log_gate.detach()).exp()  # g / stopgrad(g), also where g would underflow
        return log_gate.masked_fill(~mask, -1e30).softmax(-1) * mask.sum(-1, keepdim=True)

    def share(self, context: float) -> float:
        """Expected share of (token, expert) pairs that are selected, where tokens see `context` keys on average."""
        if self.capacity is None:
            return self.mean_share
        length = max(1.0, 2.0 * context - 1.0)  # of a sequence whose tokens see that many on average
        return min(self.mean_share, self.capacity / length)

    def flops_per_token(self) -> float:
        return sum(2.0 * parameter.numel() for parameter in self.parameters())


class UnionRouter(Balanced):
    """One level: scores in fp32, of the token itself (patch None) or of the mean of its sequence up to its patch."""

    def __init__(self, width: int, experts: int, gate: Gate, patch: int | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.gate, self.patch = gate, patch
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        self.weight.normal_(0.0, std)

    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None, name: str, allowed: Tensor | None
    ) -> Level:
        """x [B, T, D]; allowed bool [B, T, n] or None for all; name: of this level's entries in the cache."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
            if self.patch is not None:
                # The router is linear: the logits of a mean are the mean of the logits.
                logits = prefix_mean(logits, self.patch, sequence, cache, name)
            log_gate = logits.log_softmax(-1) if self.gate == "softmax" else F.logsigmoid(logits)
            with torch.no_grad():
                mask, indices = self.choose(log_gate.detach(), allowed)
                if self.training and self.counting:
                    self.load += mask.flatten(0, 1).sum(0)
        return Level(mask, log_gate, indices)

    def choose(self, log_gate: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(mask bool [B, T, n], indices int64 [B, T, k] or None)."""
        raise NotImplementedError


class TopK(UnionRouter):
    """The k best scores, plus a bias that evens the load (Wang et al. 2024, arXiv 2408.15664)."""

    bias: Tensor

    def __init__(self, width: int, experts: int, gate: Gate, patch: int | None, top_k: int, bias_rate: float):
        super().__init__(width, experts, gate, patch)
        self.top_k, self.bias_rate = top_k, bias_rate
        self.register_buffer("bias", torch.zeros(experts))

    def choose(self, log_gate: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scores = log_gate.exp() + self.bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        indices = scores.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True), indices

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        share = load.float()
        self.bias += self.bias_rate * (share.mean() - share).sign()
        self.load.zero_()


class Threshold(UnionRouter):
    """Every token whose log-odds reach the expert's threshold, a running quantile that is frozen within a step."""

    def __init__(self, width: int, experts: int, gate: Gate, patch: int | None, mean_load: float, rate: float):
        super().__init__(width, experts, gate, patch)
        self.quantiles = Quantiles(experts, mean_load, rate)

    def choose(self, log_gate: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        odds = log_gate - (-torch.expm1(log_gate)).log()
        return self.quantiles(odds, allowed), None

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        self.load.zero_()


def prefix_mean(
    logits: Tensor, patch: int, sequence: SequenceContext, cache: dict[str, Any] | None, name: str
) -> Tensor:
    """[B, T, n] -> [B, T, n]: the mean over all earlier patches of the sequence and the first token of this one.

    With patch = 1 that is the mean up to and including the token. No sum ever crosses a border: a token's value is the same
    to the last bit whether its sequence is packed or alone.
    """
    positions, T = sequence.positions, logits.shape[1]
    # Where a cache holds the beginning, tokens of this call are counted from its first one.
    local = positions if sequence.cu_seqlens is not None else positions - positions[:, :1]
    total, reach = logits, 1
    while reach < T:  # sums of the last 1, 2, 4, ... tokens
        earlier = F.pad(total, (0, 0, reach, 0))[:, :T]
        total = total + torch.where((local >= reach)[..., None], earlier, 0.0)
        reach *= 2
    if cache is not None and f"{name}_sum" in cache:
        total = total + cache[f"{name}_sum"][:, None]
    mean = total / (positions + 1)[..., None]
    if patch > 1:
        first = torch.arange(T, device=logits.device) - positions % patch  # of the token's patch, in this call
        begun = mean.gather(1, first.clamp(min=0)[..., None].expand_as(mean))
        if cache is not None and f"{name}_patch" in cache:
            begun = torch.where((first < 0)[..., None], cache[f"{name}_patch"][:, None], begun)
        mean = begun
    if cache is not None:
        cache[f"{name}_sum"], cache[f"{name}_patch"] = sequence.last(total), sequence.last(mean)
    return mean


def first_come(mask: Tensor, capacity: int, sequence: SequenceContext, cache: dict[str, Any] | None) -> Tensor:
    """The mask [B, T, n] without what comes after an expert's first `capacity` tokens of a sequence."""
    count = mask.long().cumsum(1)
    if sequence.cu_seqlens is not None:
        begin = (torch.arange(mask.shape[1], device=mask.device) - sequence.positions)[..., None].expand_as(count)
        count = count - (count - mask.long()).gather(1, begin)
    if cache is not None:
        count = count + cache["taken"][:, None] if "taken" in cache else count
        cache["taken"] = sequence.last(count)
    return mask & (count <= capacity)


def _share(config: RoutingConfig, experts: int) -> float:
    """Share of (token, expert) pairs that a config selects on average, its capacity aside."""
    if config.select == "token_choice":
        assert config.top_k is not None
        return config.top_k / experts
    kept = 1.0 if config.kept is None else config.kept / experts
    return kept if config.mean_load is None else min(kept, config.mean_load)


def _check(config: RoutingConfig, experts: int) -> None:
    most = experts if config.kept is None else config.kept
    for name, needs in (("top_k", "token_choice"), ("mean_load", "threshold")):
        given = getattr(config, name) is not None
        require(
            given == (config.select == needs),
            f"{name}={getattr(config, name)} with select={config.select}: select={needs} needs {name}, others leave it out",
        )
    require(
        (config.kept is not None) == (config.expert_select == "prefix"),
        f"kept={config.kept} with expert_select={config.expert_select}: prefix needs kept, none leaves it out",
    )
    require(
        config.expert_patch == 1 or config.expert_select == "prefix",
        f"expert_patch={config.expert_patch} needs expert_select=prefix; set it or leave expert_patch out",
    )
    require(
        config.patch == 1 or config.select != "all",
        f"patch={config.patch} with select=all: nothing is selected by patch; leave it out or choose another select",
    )
    require(
        config.kept is None or config.kept <= experts,
        f"kept={config.kept} is more than experts={experts}; choose at most {experts}",
    )
    require(
        config.top_k is None or config.top_k <= most,
        f"top_k={config.top_k} is more than the {most} experts to choose from; choose at most {most}",
    )
