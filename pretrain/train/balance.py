"""Expert balancing over the global batch, and what shows how well it works: load entropy, and the share of skipped tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from parallel.expert import stage_sum
from parallel.mesh import Mesh
from pretrain.model.router import Balanced
from pretrain.train.callback import Callback, Run


class Balance(Callback):
    """mesh: of the job; without one, all ranks are taken to hold the same layers and different tokens."""

    def __init__(self, mesh: Mesh | None = None):
        self.total = None if mesh is None else stage_sum(mesh)
        self.stages = None if mesh is None else mesh.group("pp")

    def on_step(self, run: Run) -> None:
        routers = run.model.routers()
        entropy, skipped = self._rebalance(routers, run) if routers else ({}, {})
        if self.stages is not None:  # each stage knows of its own layers
            found: list[tuple[dict[str, float], dict[str, float]]] = [({}, {})] * dist.get_world_size(self.stages)
            dist.all_gather_object(found, (entropy, skipped), group=self.stages)
            entropy, skipped = _joined([stage for stage, _ in found]), _joined([stage for _, stage in found])
        if routers or entropy:
            run.record["load_entropy"] = entropy
        if skipped:
            run.record["skip_share"] = skipped

    def _rebalance(self, routers: Mapping[str, Balanced], run: Run) -> tuple[dict[str, float], dict[str, float]]:
        """Moves every bias; returns load entropies and shares of skipped tokens by router."""
        loads = [router.load for router in routers.values()]
        # One reduction for all layers: every rank then moves the biases by the same numbers.
        own = torch.cat(loads)
        total = run.processes.sum_(own) if self.total is None else self.total(own)
        # A skipped step moves nothing, and its logits may be NaN.
        counted = math.isfinite(run.record["grad_norm"]) and "skipped" not in run.record
        entropy, skipped = {}, {}
        for (name, router), load in zip(routers.items(), total.split([load.numel() for load in loads])):
            router.rebalance(load if counted else torch.zeros_like(load))
            if not router.counts_experts:
                continue
            experts = load.numel() - router.skips
            entropy[name] = round(load_entropy(load[:experts]), 4)
            if router.skips:
                skipped[name] = round((load[experts:].sum() / load.sum().clamp(min=1)).item(), 4)
        return entropy, skipped


def _joined(stages: list[dict[str, float]]) -> dict[str, float]:
    """All routers' values, in the order of the layers, which is not that of the ranks where a rank holds several stages."""
    found = {name: value for stage in stages for name, value in stage.items()}
    return dict(
        sorted(found.items(), key=lambda item: [(not part.isdigit(), part.zfill(9)) for part in item[0].split(".")])
    )


def load_entropy(load: torch.Tensor) -> float:
    """Entropy of the expert loads [E] as a share of its maximum: 1 when all experts got the same, 0 when one got everything."""
    share = load.double() / load.sum().clamp(min=1)
    entropy = abs((share * share.clamp(min=1e-30).log()).sum().item())
    return entropy / math.log(load.numel()) if load.numel() > 1 else 1.0
