"""What the ranks of the gradient tests run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from parallel.expert.apply import apply_experts
from parallel.expert.loads import share_loads
from parallel.gradients import GradientRule, sum_gradients
from parallel.layout import local
from parallel.tensor import apply_tensor
from pretrain.model.decoder import Decoder
from tests.parallel.tensor_ranks import Held, gradients, held, mesh_of, model_of


def batch() -> tuple[Tensor, Tensor]:
    """(tokens, targets) [4, 16]."""
    tokens = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:].masked_fill(tokens[:, 1:] < 20, -100)


def backward(model: Decoder, rank: int, ranks: int, scale: float = 1.0) -> None:
    """The gradient of this rank's rows' share of the mean loss."""
    tokens, targets = batch()
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    loss = model(tokens[rows], targets=targets[rows]) / (targets != -100).sum()
    (scale * loss).backward()


def reduced(rank: int, world: int, name: str, sizes: dict[str, Any], sharded: bool) -> dict[str, Any]:
    """Gradients and norms of one step on a layout, the engine's part of the sums included."""
    mesh = mesh_of(rank, world, **sizes)
    model = model_of(name)
    apply_tensor(model, mesh)
    apply_experts(model, mesh)
    share_loads(model, mesh)
    if sharded:
        for block in model.blocks:
            fully_shard(block, mesh=mesh.dp)
        fully_shard(model, mesh=mesh.dp, reshard_after_forward=False)
    rule = GradientRule(model, mesh)
    model.train()
    backward(model, mesh.dp_rank, mesh.dp_size, mesh.dp_size if sharded else 1.0)  # FSDP2 averages
    if not sharded:
        sum_gradients(model, mesh)
    rule.reduce()
    found: dict[str, Any] = {"gradient": held(gradients(model)), "norm": rule.clip(0.1)}
    found["clipped"] = rule.clip(None)
    return found


def one(name: str) -> tuple[Held, float]:
    """The same on one rank, its norm by torch."""
    model = model_of(name)
    model.train()
    backward(model, 0, 1)
    found = held(gradients(model))
    return found, float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))


def poisoned(rank: int, world: int) -> tuple[float, bool]:
    """One rank's gradient is not finite: (the norm, whether the gradients were left alone)."""
    mesh = mesh_of(rank, world, tp=2, dp=2)
    model = model_of("one key head")
    apply_tensor(model, mesh)
    backward(model, mesh.dp_rank, mesh.dp_size)
    rule = GradientRule(model, mesh)
    sum_gradients(model, mesh)
    rule.reduce()
    if rank == 2:
        model.norm.weight.grad[0] = torch.inf
    before = model.embedding.weight.grad.clone()
    norm = rule.clip(1e-3)
    return norm, torch.equal(before, model.embedding.weight.grad)


def incomplete(rank: int, world: int) -> str:
    mesh = mesh_of(rank, world, tp=2)
    model = model_of("one key head")
    apply_tensor(model, mesh)
    backward(model, 0, 1)
    if rank == 1:
        model.norm.weight.grad = None
    try:
        GradientRule(model, mesh).reduce()
    except RuntimeError as error:
        return str(error)
    return ""


def in_half_precision(rank: int, world: int) -> tuple[list[Tensor], float, float]:
    """Gradients of two dtypes in one model, as with bf16 weights in part of it."""
    mesh = mesh_of(rank, world, tp=2)
    model = model_of("one key head")
    apply_tensor(model, mesh)
    model.norm.weight.data = model.norm.weight.data.bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
    rule = GradientRule(model, mesh)
    rule.reduce()
    values = [local(p.grad).unique() for p in (model.norm.weight, model.blocks[0].mixer.out.weight)]
    elements = sum(p.numel() for p in model_of("one key head").parameters())
    return values, rule.clip(None), float(elements)
