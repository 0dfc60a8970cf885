"""What the ranks of the DeepSpeed tests run, besides whole training runs."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import apply_context
from parallel.engines import DeepSpeedConfig, Engine, TorchConfig, build
from parallel.expert import apply_experts, share_loads
from parallel.grid import MeshConfig
from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain.model.decoder import Decoder
from tests.parallel.gradient_ranks import batch
from tests.parallel.tensor_ranks import model_of

ADAMW = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), foreach=True)


def engine_of(name: str, rank: int, world: int, config: Any, clip: float = 0.1, **sizes: int) -> Engine:
    mesh = Mesh(MeshConfig(**sizes), Processes(rank, world, rank, torch.device("cpu"), timedelta(seconds=77)))
    model = model_of(name).float()
    apply_experts(model, mesh)
    apply_context(model, mesh)
    share_loads(model, mesh)
    model.train()
    return build(config, model, list(model.blocks), lambda model: ADAMW(model.parameters()), mesh, clip)


def step(engine: Engine, rank: int, ranks: int) -> tuple[float, float]:
    """(this rank's share of the mean loss, the gradient's norm) of one step on this rank's rows of four."""
    tokens, targets = batch()
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    loss = engine(tokens[rows], targets=targets[rows]) / (targets != -100).sum()
    engine.backward(loss, last=True)
    return loss.item(), engine.step(1e-3)


def families(rank: int, world: int, names: list[str], engine: str) -> dict[str, list[tuple[float, float]]]:
    """Two steps of each model: (share of the loss, norm)."""
    config: Any = DeepSpeedConfig(stage=3, keep_whole=0) if engine == "zero3" else TorchConfig()
    found = {}
    for name in names:
        made = engine_of(name, rank, world, config)
        found[name] = [step(made, rank, world) for _ in range(2)]
        if engine == "zero3":  # nothing is whole between steps
            assert not any(parameter.numel() for parameter in made.model.parameters()), name
    return found


def poisoned(rank: int, world: int, sizes: dict[str, int], where: str) -> list[Any]:
    """A step in which one rank's gradient of one parameter is not finite, then a good one: norm and what changed, of each."""
    engine = engine_of("ffn moe_softmax", rank, world, DeepSpeedConfig(stage=2), **sizes)
    parameter = dict(engine.model.named_parameters())[where]
    found: list[Any] = []
    for poison in (True, False):
        before = {name: tensor.clone() for name, tensor in local_tensors(engine.model).items()}
        hook = parameter.register_hook(lambda gradient: gradient * torch.nan) if poison and rank == world - 1 else None
        _, norm = step(engine, rank, world)
        if hook is not None:
            hook.remove()
        after = local_tensors(engine.model)
        found.append((norm, sorted(name for name in before if not torch.equal(before[name], after[name]))))
    counts = {name: float(tensor) for name, tensor in engine.state_tensors().items() if name.endswith("/step")}
    return [*found, set(counts.values())]


def local_tensors(model: Decoder | torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def patience(rank: int, world: int) -> tuple[float, float]:
    """Seconds that DeepSpeed's group waits, and elements of the whole embedding that this rank keeps of its optimizer state."""
    made: Any = engine_of("mixer attention", rank, world, DeepSpeedConfig(stage=3, keep_whole=0))
    group = made.engine.seq_data_parallel_group
    assert dist.get_process_group_ranks(group) == list(range(world))
    moments = made.state_tensors()["optimizer/embedding.weight/exp_avg"]
    return group._get_backend(
        torch.device("cpu")
    ).options._timeout.total_seconds(), moments.held.numel() / moments.numel()
