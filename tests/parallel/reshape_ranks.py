"""What the ranks of the reshaping tests run: models on a layout, written to and read from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from parallel.expert.apply import apply_experts
from parallel.layout import boxes, local
from parallel.mesh import Mesh
from parallel.pipeline.plan import Plan
from parallel.share import Share
from parallel.state import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    named_parameters,
    optimizer_tensors,
)
from parallel.tensor import apply_tensor
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.model.decoder import Decoder
from pretrain.model.stage import Stage, Stages
from tests.parallel.tensor_ranks import Held, held, mesh_of
from tests.pretrain.families import build

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp 2": (2, {"tp": 2}),
    "tp 4": (4, {"tp": 4}),
    "dp 2": (2, {"dp": 2}),
    "tp 2 x dp 2": (4, {"tp": 2, "dp": 2}),
    "ep 2": (2, {"ep": 2, "dp": 2}),
    "tp 2, expert tensor": (2, {"tp": 2, "expert_tensor": True}),
    "pp 2 in a V x dp 2": (4, {"pp": 2, "pp_schedule": "zbv", "pp_layers": [1, 0, 1, 0], "dp": 2}),
    "pp 2 x tp 2": (4, {"pp": 2, "tp": 2}),
}
CHANGES: dict[str, Any] = {  # copies of key heads and groups, fused rows, experts, a whole head
    "mixers": {
        "a": {"kind": "attention", "heads": 4, "kv_heads": 1, "qkv_bias": True, "out_bias": True},
        "m": {"kind": "mamba2", "head_dim": 16, "state_dim": 8, "groups": 2, "bias": True},
    },
    "ffns": {
        "e": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 12, "shared_hidden": 12},
        "h": {"kind": "hourglass", "hidden": [8, 12], "lift": 48},
    },
    "layers": ["a + e", "m + h"],
    "tie_embeddings": False,
    "multi_token": {"layer": "a + h"},  # which has the last stage of a pipeline hold the embedding, too
}


Model = Decoder | Stages


def job(rank: int, world: int, sizes: dict[str, Any], seed: int) -> tuple[Mesh, Model, torch.optim.Optimizer]:
    """A model and its optimizer on a layout."""
    mesh = mesh_of(rank, world, **sizes)
    whole = build("mixer attention", seed, **CHANGES)
    parts: list[Decoder] = [whole]
    if mesh.size("pp") > 1:
        plan = Plan.of(sizes.get("pp_schedule", "1f1b"), mesh.size("pp"), [1.0, 1.0], counts=sizes.get("pp_layers"))
        parts = [Stage(whole, plan.layers, index) for index in plan.held_by(mesh.rank("pp"))]
    for part in parts:
        apply_tensor(part, mesh)
        apply_experts(part, mesh)
        if mesh.dp is not None and mesh.size("ep") == 1:
            for block in part.layers():
                fully_shard(block, mesh=mesh.dp)
            fully_shard(part, mesh=mesh.dp, reshard_after_forward=False)
    model = whole if parts == [whole] else Stages(parts)
    return mesh, model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def state(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**model_tensors(model), **optimizer_tensors(model, optimizer)}


def save(rank: int, world: int, sizes: dict[str, Any], folder: str) -> Held:
    """Writes a checkpoint with different numbers everywhere; what was written."""
    _, model, optimizer = job(rank, world, sizes, 0)
    for name, tensor in state(model, optimizer).items():
        scramble(name, tensor)
    tensors = state(model, optimizer)
    load_model_tensors(model, tensors)  # into second copies, as of an embedding at both ends of a V
    load_optimizer_tensors(model, optimizer, tensors)
    Checkpoints(Path(folder)).save(2, tensors, {"step": 2})
    return held(tensors)


def scramble(name: str, tensor: Tensor) -> None:
    """Random numbers, the same for the same place of the whole tensor."""
    own, each = (tensor.held, tensor.cuts) if isinstance(tensor, Share) else (tensor, ())
    generator = torch.Generator().manual_seed(sum(name.encode()))
    whole = (torch.rand(tuple(tensor.shape), generator=generator) * 100).to(tensor.dtype)
    for box in boxes(own, each):
        box.of(local(own)).copy_(box.of_whole(whole))


def load(rank: int, world: int, sizes: dict[str, Any], folders: dict[str, str]) -> dict[str, Held]:
    """What each checkpoint gives on this layout."""
    found = {}
    for seed, (name, folder) in enumerate(folders.items(), 1):
        _, model, optimizer = job(rank, world, sizes, seed)
        tensors = state(model, optimizer)
        resumed = Checkpoints(Path(folder)).resume(tensors)
        assert resumed is not None and resumed.step == 2
        load_model_tensors(model, tensors)
        load_optimizer_tensors(model, optimizer, tensors)
        found[name] = held(state(model, optimizer))
        check_copies(model, optimizer)
    return found


def check_copies(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Parameters of one name in two stages are equal, and so is their optimizer state."""
    first: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model):
        one = first.setdefault(name, parameter)
        for a, b in zip([one, *optimizer.state[one].values()], [parameter, *optimizer.state[parameter].values()]):
            assert torch.equal(local(a), local(b)), name


def copies(rank: int, world: int) -> Held:
    """A job on tp, given whole tensors and then another job's shares."""
    _, model, _ = job(rank, world, {"tp": 2}, 3)
    whole = build("mixer attention", 0, **CHANGES)
    load_model_tensors(model, model_tensors(whole))
    _, other, _ = job(rank, world, {"tp": 2}, 4)
    load_model_tensors(other, model_tensors(model))
    return held(model_tensors(other))
