"""Expert balancing over the global batch, and what shows how well it works: load entropy, and the share of skipped tokens."""

from __future__ import annotations

import math

import torch

from pretrain.train.callback import Callback, Run


class Balance(Callback):
    def on_step(self, run: Run) -> None:
        routers = run.model.routers()
        if not routers:
            return
        loads = [router.load for router in routers.values()]
        # One reduction for all layers: every rank then moves the biases by the same numbers.
        total = run.processes.sum_(torch.cat(loads))
        counted = math.isfinite(run.record["grad_norm"])  # a skipped step moves nothing, and its logits may be NaN
        entropy, skipped = {}, {}
        for (name, router), load in zip(routers.items(), total.split([load.numel() for load in loads])):
            router.rebalance(load if counted else torch.zeros_like(load))
            if not router.counts_experts:
                continue
            experts = load.numel() - router.skips
            entropy[name] = round(load_entropy(load[:experts]), 4)
            if router.skips:
                skipped[name] = round((load[experts:].sum() / load.sum().clamp(min=1)).item(), 4)
        run.record["load_entropy"] = entropy
        if skipped:
            run.record["skip_share"] = skipped


def load_entropy(load: torch.Tensor) -> float:
    """Entropy of the expert loads [E] as a share of its maximum: 1 when all experts got the same, 0 when one got everything."""
    share = load.double() / load.sum().clamp(min=1)
    entropy = abs((share * share.clamp(min=1e-30).log()).sum().item())
    return entropy / math.log(load.numel()) if load.numel() > 1 else 1.0
