"""Data-parallel engines behind one small interface. `build` picks one by the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from parallel.engines.base import Engine
from parallel.engines.deepspeed import DeepSpeedConfig
from parallel.engines.torch import TorchConfig
from parallel.mesh import Mesh

EngineConfig = Annotated[TorchConfig | DeepSpeedConfig, Field(discriminator="kind")]

# Makes the optimizer for a model whose parameters may already be sharded.
OptimizerFactory = Callable[[nn.Module], Optimizer]

__all__ = ["DeepSpeedConfig", "Engine", "EngineConfig", "OptimizerFactory", "TorchConfig", "build"]


def build(
    config: Any, model: nn.Module, blocks: list[nn.Module], optimizer: OptimizerFactory, mesh: Mesh, clip: float | None
) -> Engine:
    """The engine that trains `model` on `mesh`.

    blocks: the modules that are gathered and freed one at a time when parameters are sharded. clip: largest gradient norm.
    """
    return config.build(model, blocks, optimizer, mesh, clip)
