"""The torch engine over a pipeline: the stages of this rank, each sharded by itself, and one optimizer for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engines.base import MicroBatch
from parallel.engines.torch import TorchConfig, TorchEngine, shard
from parallel.mesh import Mesh
from parallel.pipeline.plan import Plan
from parallel.pipeline.runner import PipelineRunner


class PipelinedEngine(TorchEngine):
    """`model` holds the stages as its children, in order: plan.held_by(this rank). What a stage is: pipeline/runner.py."""

    def __init__(
        self,
        config: TorchConfig,
        model: nn.Module,
        blocks: Sequence[list[nn.Module]],
        plan: Plan,
        optimizer: Any,
        mesh: Mesh,
        clip: float | None,
    ):
        """blocks: of each stage, the modules that are gathered and freed one at a time when parameters are sharded."""
        self.stages, self.blocks, self.plan = list(model.children()), blocks, plan
        assert not config.reduce_each_micro_batch, "a pipeline reduces once a step"
        super().__init__(config, model, [], optimizer, mesh, clip)
        # After sharding, which replaces parameters and wraps forwards.
        self.runner = PipelineRunner(self.stages, plan, mesh)

    def shard(self, blocks: list[nn.Module], config: TorchConfig) -> None:
        for stage, own in zip(self.stages, self.blocks, strict=True):
            shard(stage, own, self.mesh, config)

    def copies(self) -> dict[str, int]:
        stages: list[Any] = self.stages
        return {name: 2 for stage in stages for name in stage.shared()}

    def forward_backward(
        self,
        batches: Sequence[MicroBatch],
        denominator: float,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        return self.runner.forward_backward([self.cut(batch) for batch in batches], denominator, context)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        return self.runner.evaluate(self.cut(batch))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("no rank of a pipeline has the whole model: call forward_backward or evaluate")

    def backward(self, loss: Tensor, last: bool) -> None:
        raise TypeError("a pipeline runs forward and backward passes by its schedule: call forward_backward")

    def reduce(self) -> None:
        super().reduce()
        self.runner.sum_shared_gradients()
