"""Probes of unions of experts: who depends on whom, selections given by hand, and the released selection rule, which leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry, ContextualFFN, Sublayer
from pretrain.model.union import Selection

# Every causal form of the routing, for 4 experts: C1 token choice, C2 threshold, C3 prefix, C4 patches, and their mixtures.
FORMS: dict[str, dict[str, Any]] = {
    "token choice": {"top_k": 2},
    "token choice, sigmoid, capacity": {"top_k": 2, "gate": "sigmoid", "capacity": 5},
    "mean-one gates": {"top_k": 2, "router_gradient": "mean_one"},
    "threshold": {"select": "threshold", "mean_load": 0.4},
    "threshold by patch": {"select": "threshold", "mean_load": 0.4, "patch": 3},
    "prefix experts": {"select": "all", "expert_select": "prefix", "kept": 2},
    "prefix experts by patch": {"select": "all", "expert_select": "prefix", "kept": 2, "expert_patch": 4},
    "patches": {"top_k": 2, "patch": 4},
    "experts by patch, then tokens": {"top_k": 1, "expert_select": "prefix", "kept": 2, "expert_patch": 4},
    "experts, then threshold, capacity": {
        "select": "threshold", "mean_load": 0.4, "expert_select": "prefix", "kept": 3, "capacity": 4,
    },
}  # fmt: skip


def context(B: int, T: int, borders: list[int] | None = None, offset: int = 0) -> SequenceContext:
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    return SequenceContext.of(torch.zeros(B, T, dtype=torch.long), cu_seqlens, offset)


def drawn(sublayer: Any, std: float = 0.5, seed: int = 0) -> Any:
    """The sublayer in fp64 with seeded weights, its thresholds where a first batch puts them."""
    torch.manual_seed(seed)
    for module in sublayer.modules():
        init_weights = getattr(type(module), "init_weights", None)
        if init_weights is not None:
            init_weights(module, std)
    sublayer.double().train()
    run(
        sublayer,
        torch.randn(2, 64, sublayer.down.shape[-1] if hasattr(sublayer, "down") else sublayer.out.shape[-1]).double(),
    )
    for module in sublayer.modules():
        if hasattr(module, "rebalance"):
            module.rebalance(module.load.clone())
    return sublayer.eval()


def run(
    sublayer: Sublayer, x: Tensor, sequence: SequenceContext | None = None, cache: dict[str, Any] | None = None
) -> Tensor:
    sequence = sequence or context(*x.shape[:2])
    if isinstance(sublayer, ContextualFFN):
        return sublayer(x, sequence, cache, Carry())[0]
    return sublayer(x, sequence, cache)


def leak(f: Callable[[Tensor], Tensor], x: Tensor, t: int) -> float:
    """The largest change of outputs before token t when the tokens from t on are others."""
    changed = x.clone()
    changed[:, t:] = torch.randn(x[:, t:].shape, generator=torch.Generator().manual_seed(9)).to(x) * 2
    return (f(changed) - f(x))[:, :t].abs().max().item()


def fixed(mask: Tensor) -> Callable[..., Selection]:
    """A routing that always answers with this mask [B, T, n]."""
    return lambda x, sequence, cache=None: Selection(mask, mask.to(x), None, ())


def released(weight: Tensor, top_k: int, fill: bool) -> Callable[..., Selection]:
    """The released selection: top k per token, then the c best rows of each expert over the WHOLE sequence.

    fill: c is the largest load, and experts with fewer tokens are filled up with rows that nobody gave them (its attention);
    otherwise c is half of the rows (its feed-forward, pure expert choice where top_k is the number of experts).
    """

    def routing(x: Tensor, sequence: SequenceContext, cache: object = None) -> Selection:
        p = (x @ weight.T).softmax(-1)
        m = torch.zeros_like(p).scatter(-1, p.topk(top_k, dim=-1).indices, 1.0) * p
        g = x.shape[0] * m / (m.sum(0, keepdim=True) + 1e-8)
        c = int((g > 0).sum(1).max()) if fill else x.shape[1] // 2
        mask = torch.zeros_like(g, dtype=torch.bool).scatter_(1, g.topk(c, dim=1).indices, True)
        return Selection(mask, mask.to(x), None, ())

    return routing
