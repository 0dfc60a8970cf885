"""A few steps of training on one layout, and all that they have computed, whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.engines.torch import TorchEngine
from parallel.grid import AXES
from parallel.mesh import Mesh
from parallel.processes import Processes
from parallel.state import model_tensors
from parallel.whole import Whole, assemble, gathered, gradients
from pretrain.config import RunConfig
from pretrain.data.batch import IGNORE, Batch
from pretrain.model.decoder import Decoder
from pretrain.model.router import Balanced
from pretrain.train.balance import Balance
from pretrain.train.build import engine_for
from pretrain.train.callback import Run

Loads = dict[str, list[Tensor]]


@dataclass
class Outcome:
    """What training gave, on the job's first rank (elsewhere of what is gathered there is nothing).

    losses: mean of each step. norms: of each rank, the gradient norm of each step. loads: of each rank, by router the loads that
    balancing was told, of each step. gradients: of the first step, before clipping; None where the engine keeps them to itself.
    updates: parameters and buffers after the last step minus before the first; sizes: the largest number of each, before.
    """

    losses: list[float]
    norms: list[list[float]]
    gradients: dict[str, Whole] | None
    updates: dict[str, Whole]
    sizes: dict[str, float]
    loads: list[Loads]


def run(config: RunConfig, job: Processes, batches: list[list[Batch]], dtype: torch.dtype = torch.float32) -> Outcome:
    """Trains on the given global batches, a list of rows for each step, with parameters of dtype. Collective over the job.

    The i-th micro-batch of a step is the next rows, one for each data-parallel rank.
    """
    mesh = Mesh(config.mesh, job)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return _run(config, mesh, job, batches)
    finally:
        torch.set_default_dtype(usual)
        _leave(mesh)


def _run(config: RunConfig, mesh: Mesh, job: Processes, batches: list[list[Batch]]) -> Outcome:
    torch.manual_seed(config.train.seed)
    model = Decoder(config.model).to(job.device)
    before = {name: tensor.double().cpu().clone() for name, tensor in model_tensors(model).items()}
    engine = engine_for(config, mesh, model)
    del model  # of which this rank may hold a part only
    part: Any = engine.model
    balance, record = Balance(mesh), Run(config, job, engine, part)
    loads = _listen(part.routers())
    losses: list[float] = []
    norms: list[float] = []
    first: dict[str, Whole] | None = None
    for step, rows in enumerate(batches):
        mine = [row.to(job.device) for row in rows[mesh.dp_rank :: mesh.dp_size]]
        share = engine.forward_backward(mine, float(sum(row.scored for row in rows)))
        if isinstance(engine, TorchEngine):
            engine.reduce()
            if step == 0:
                first = assemble(gradients(part), job)
            norms.append(engine.update(config.optimizer.lr))
        else:
            norms.append(engine.step(config.optimizer.lr))
        losses.append(job.sum([share.item()])[0])
        record.record["grad_norm"] = norms[-1]
        balance.on_step(record)
    state = [(name, tensor) for name, tensor in engine.state_tensors().items() if name.startswith("model/")]
    updates = {
        name.removeprefix("model/"): Whole(after.double() - before[name], spread)
        for name, (after, spread) in assemble(state, job).items()
    }
    sizes = {
        name.removeprefix("model/"): tensor.abs().max().item() for name, tensor in before.items() if tensor.numel()
    }
    return Outcome(losses, gathered(norms, job), first, updates, sizes, gathered(loads, job))


def _listen(routers: Mapping[str, Balanced]) -> Loads:
    """What each router's balancing will be told, step by step."""
    heard: Loads = {name: [] for name in routers}

    def listener(name: str, rebalance: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def told(load: Tensor) -> None:
            heard[name].append(load.detach().cpu().clone())
            rebalance(load)

        return told

    for name, router in routers.items():
        router.rebalance = listener(name, router.rebalance)  # type: ignore[method-assign, assignment]
    return heard


def _leave(mesh: Mesh) -> None:
    """Takes the layout's process groups down: another layout makes its own."""
    everyone = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    for group in {group for axis in AXES if (group := mesh.group(axis)) is not None} - {everyone}:
        torch.distributed.destroy_process_group(group)


def rows(steps: int, count: int, length: int, vocabulary: int) -> list[list[Batch]]:
    """Packed rows of `length` random tokens, `count` for each step: documents of any length, and parts without targets."""
    generator = torch.Generator().manual_seed(0)

    def draw(end: int) -> int:
        return int(torch.randint(0, end, (), generator=generator))

    made = []
    for _ in range(steps * count):
        tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
        borders = (torch.randperm(length - 1, generator=generator)[: draw(4)] + 1).sort().values
        targets = tokens.roll(-1, dims=1)
        targets[:, torch.cat((borders - 1, torch.tensor([length - 1])))] = IGNORE
        targets[:, : draw(length // 2)] = IGNORE  # ranks and micro-batches must not weigh the same
        made.append(Batch(tokens, targets, torch.tensor([0, *borders.tolist(), length], dtype=torch.int32)))
    return [made[step * count : (step + 1) * count] for step in range(steps)]


def joined(batches: list[list[Batch]], dp: int) -> list[list[Batch]]:
    """The same steps for one rank: the rows that dp ranks compute at a time become one row.

    Balancing losses are means over a micro-batch of all ranks, so one rank must see the same micro-batches.
    """
    return [[_join(step[i : i + dp]) for i in range(0, len(step), dp)] for step in batches]


def _join(rows: list[Batch]) -> Batch:
    borders, start = [torch.zeros(1, dtype=torch.int32)], 0
    for row in rows:
        borders.append(row.cu_seqlens[1:] + start)
        start += row.tokens.shape[1]
    tokens, targets = torch.cat([row.tokens for row in rows], 1), torch.cat([row.targets for row in rows], 1)
    return Batch(tokens, targets, torch.cat(borders).to(torch.int32))
