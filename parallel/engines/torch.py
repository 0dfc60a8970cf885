"""The torch engine: a plain module on one rank; on more, FSDP2 (parameters, gradients and optimizer state fully sharded), perhaps
in groups that are replicas of each other (HSDP), or replicas alone (plain data parallelism)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.config import Strict
from parallel.context import cut_batch
from parallel.engines.base import Engine, Veto
from parallel.engines.evidence import Evidence, WatchedReduceScatter
from parallel.engines.placement import placement
from parallel.engines.units import units
from parallel.gradients import BUCKET, GradientRule, sum_gradients
from parallel.layout import cuts
from parallel.mesh import Mesh
from parallel.state import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    named_parameters,
    optimizer_tensors,
)


class TorchConfig(Strict):
    kind: Literal["torch"] = "torch"
    reshard_after_forward: bool = True
    """Free each block's gathered parameters after its forward pass and gather them again for the backward pass: less memory,
    half as much communication again."""
    prefetch: int = Field(1, ge=1)
    """How many blocks (or units of them, see bucket_bytes) are gathered ahead of the one at work, forward and backward. More
    hide slower links behind faster blocks; each takes the memory of its gathered parameters."""
    reduce_each_micro_batch: bool = False
    """Reduce gradients after every micro-batch: only shards are kept between micro-batches, for more communication."""
    bucket_bytes: int | None = Field(None, ge=1)
    """Gradients of so many bytes are summed in one call; `python -m parallel.fabric` finds the number for a cluster. Where
    parameters are sharded, neighbouring blocks join until their gradients are that large: FSDP2 gathers, reduces and frees them
    as one, which takes the memory of as many blocks, and one block is the least. null: each block alone, and 32 MiB where
    nothing is sharded."""

    def build(self, model: nn.Module, blocks: Any, optimizer: Any, mesh: Mesh, clip: float | None) -> TorchEngine:
        return TorchEngine(self, model, blocks, optimizer, mesh, clip)


class TorchEngine(Engine):
    """The model has been cut over tensor, expert and context ranks before (parallel/tensor.py, expert/, context/)."""

    def __init__(
        self,
        config: TorchConfig,
        model: nn.Module,
        blocks: list[nn.Module],
        optimizer: Any,
        mesh: Mesh,
        clip: float | None,
    ):
        self.model, self.clip, self.mesh = model, clip, mesh
        self.bucket_bytes = config.bucket_bytes
        self.reduce_each = config.reduce_each_micro_batch
        self.cut = partial(cut_batch, mesh=mesh)
        self.sharded = mesh.size("shard_cp") > 1
        if self.sharded:
            self.shard(blocks, config)
        self.optimizer: Optimizer = optimizer(model)
        self.rule = GradientRule(model, mesh, self.copies(), bucket=self.bucket_bytes or BUCKET)
        self.seen: Evidence | None = None

    def shard(self, blocks: list[nn.Module], config: TorchConfig) -> None:
        """Shards the model over its data-parallel ranks."""
        shard(self.model, blocks, self.mesh, config)

    def copies(self) -> dict[str, int]:
        """How many pipeline stages hold a parameter, by name, where more than one does."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.reduce_each)
        loss.backward()

    def reduce(self) -> None:
        """Completes the sums over ranks: from here on every gradient is the whole job's. `step` begins with it."""
        if self.seen is not None:
            # What FSDP2 shards it has summed by now, and shown before that.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.seen.see([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
            self.seen.close()
        if not self.sharded:
            sum_gradients(self.model, self.mesh, self.bucket_bytes or BUCKET)
        self.rule.reduce()

    def step(self, lr: float, veto: Veto = None) -> float:
        self.reduce()
        return self.update(lr, veto)

    def update(self, lr: float, veto: Veto = None) -> float:
        """What follows in a step: clips, updates, clears the gradients; returns their norm before clipping."""
        norm = self.rule.clip(self.clip)
        if math.isfinite(norm) and not (veto is not None and veto(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def watch(self) -> bool:
        if self.mesh.processes.world > 1:  # alone, a rank needs no evidence that it was the one
            self.seen = Evidence()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(WatchedReduceScatter(self.seen))  # type: ignore[arg-type]
        return True

    def evidence(self) -> bytes:
        return b"" if self.seen is None else self.seen.bits()

    def state_tensors(self) -> dict[str, Tensor]:
        return {**model_tensors(self.model), **optimizer_tensors(self.model, self.optimizer)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_model_tensors(self.model, tensors)
        load_optimizer_tensors(self.model, self.optimizer, tensors)


def shard(root: nn.Module, blocks: list[nn.Module], mesh: Mesh, config: TorchConfig) -> None:
    """FSDP2 for a module and, gathered and freed one at a time, its blocks, or units of them (see units.py)."""
    axes = [axis for axis in ("replicate", "shard_cp") if mesh.size(axis) > 1]
    # Experts that are spread over ranks belong to fewer ranks than these: they stay as they are, and the gradient rule adds
    # them up over their own.
    spread = {name for name, each in cuts(root).items() if any(cut.axis == "ep" for cut in each)}
    apart = {parameter for name, parameter in named_parameters(root) if name in spread}
    ranks = mesh.size("shard_cp")
    options: dict[str, Any] = {
        "mesh": mesh.device_mesh(*axes),
        "ignored_params": apart,
        "shard_placement_fn": lambda parameter: placement(parameter, ranks),
    }
    joined = units(root, blocks, config.bucket_bytes, apart)
    for unit in joined:
        fully_shard(unit if len(unit) > 1 else unit[0], reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(root, reshard_after_forward=False, **options)  # the root is needed again at once
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are sums over ranks, not means
            module.set_force_sum_reduction_for_comms(True)  # and no scaling inside the collective, which gloo has not
    prefetch(root, [unit[0] for unit in joined], config.prefetch)


def prefetch(root: nn.Module, order: Sequence[nn.Module], depth: int) -> None:
    """Lets every unit, when its own parameters are there, gather those of the `depth` units that come next, in both passes.

    order: the first module of each unit, which stands for it, in the order of the forward pass, all of them called in every pass.
    """
    firsts = cast(Sequence[FSDPModule], order)
    for i, unit in enumerate(firsts):
        unit.set_modules_to_forward_prefetch(list(firsts[i + 1 : i + 1 + depth]))
        unit.set_modules_to_backward_prefetch(list(firsts[max(0, i - depth) : i][::-1]))
    assert isinstance(root, FSDPModule)
    root.set_modules_to_forward_prefetch(list(firsts[:depth]))
    root.set_modules_to_backward_prefetch(list(firsts[::-1][:depth]))
