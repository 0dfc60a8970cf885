"""The torch engine: a plain module on one rank, FSDP2 (fully sharded parameters, gradients and optimizer state) on more."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.config import Strict
from parallel.engines.base import Engine
from parallel.mesh import Mesh
from parallel.state import load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors


class TorchConfig(Strict):
    kind: Literal["torch"] = "torch"
    reshard_after_forward: bool = True
    """Free each block's gathered parameters after its forward pass and gather them again for the backward pass: less memory,
    half as much communication again."""
    reduce_each_micro_batch: bool = False
    """Reduce gradients after every micro-batch: only shards are kept between micro-batches, for more communication."""

    def build(self, model: nn.Module, blocks: Any, optimizer: Any, mesh: Mesh, clip: float | None) -> TorchEngine:
        return TorchEngine(self, model, blocks, optimizer, mesh, clip)


class TorchEngine(Engine):
    def __init__(
        self,
        config: TorchConfig,
        model: nn.Module,
        blocks: list[nn.Module],
        optimizer: Any,
        mesh: Mesh,
        clip: float | None,
    ):
        self.model, self.clip, self.ranks = model, clip, mesh.dp_size
        self.reduce_each = config.reduce_each_micro_batch
        if mesh.dp is not None:
            for block in blocks:
                fully_shard(block, mesh=mesh.dp, reshard_after_forward=config.reshard_after_forward)
            fully_shard(model, mesh=mesh.dp, reshard_after_forward=False)  # the root is needed again at once
        self.optimizer: Optimizer = optimizer(model)
        self.parameters = list(model.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.reduce_each)
            loss = loss * self.ranks  # FSDP2 averages over ranks; the interface promises a sum
        loss.backward()

    def step(self, lr: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip if self.clip is not None else math.inf)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(value):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def state_tensors(self) -> dict[str, Tensor]:
        return {**model_tensors(self.model), **optimizer_tensors(self.model, self.optimizer)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_model_tensors(self.model, tensors)
        load_optimizer_tensors(self.model, self.optimizer, tensors)
