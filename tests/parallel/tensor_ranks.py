"""What the ranks of the tensor-parallel tests run, and how a test puts their parts together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.expert.loads import share_loads
from parallel.gradients import GradientRule
from parallel.grid import MeshConfig
from parallel.layout import boxes, cuts, local
from parallel.mesh import Mesh
from parallel.processes import Processes
from parallel.share import Share
from parallel.state import model_tensors, named_parameters
from parallel.tensor import apply_tensor
from pretrain.model.decoder import Decoder
from tests.pretrain.families import FAMILIES, build

# Sizes that four ranks can share; families have the fewest heads that make sense on one.
WIDER: dict[str, dict[str, Any]] = {
    "gated_attention": {"heads": 4},
    "wide_attention": {"heads": 4, "kv_heads": 2, "head_dim": 8},
    "conv_attention": {"heads": 4, "kv_heads": 1, "qkv_bias": True, "out_bias": True},
    "cca": {"heads": 8, "kv_heads": 4, "head_dim": 8},
    "mla": {"heads": 4, "query_rank": 10},
    "linear_attention": {"heads": 4, "conv_width": 3},
    "gla": {"heads": 4, "conv_width": 3},
    "hgrn2": {"heads": 4},
    "retnet": {"heads": 4},
    "delta_net": {"heads": 4, "head_dim": 8, "output_gate": True},
    "gated_delta_net": {"heads": 2, "value_heads": 4, "head_dim": 8},
    "kda": {"heads": 4, "head_dim": 8},
    "kda_safe": {"heads": 2, "value_heads": 4, "head_dim": 8, "output_gate_bias": True},
    "mamba2": {"bias": True},
    "mlp": {"bias": True},
}
ATTENTION = {"kind": "attention", "heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "one key head": {"mixers": {"a": {**ATTENTION, "kv_heads": 1, "output_gate": True}}},
    "two key heads": {"mixers": {"a": {**ATTENTION, "kv_heads": 2, "zero_centered_norm": True}}},
    "Mamba-2, one group": {"mixers": {"a": {"kind": "mamba2", "head_dim": 16, "state_dim": 8, "norm_first": True}}},
    "Mamba with biases": {"mixers": {"a": {"kind": "mamba", "state_dim": 4, "bias": True}}},
    "HGRN2, norm per head": {"mixers": {"a": {"kind": "hgrn2", "heads": 4, "norm_per_head": True}}},
    "CCA, odd halves": {"mixers": {"a": {"kind": "cca", "heads": 4, "kv_heads": 4, "head_dim": 8}}},
    "UoE with biases": {
        "mixers": {"a": ATTENTION},
        "ffns": {
            "f": {
                "kind": "union_of_experts", "hidden": 32, "experts": 4, "select": "token_choice", "top_k": 2,
                "bias": True, "balance_loss": 0.1, "router_gradient": "mean_one", "activation": "gelu",
            }
        },
    },
    "KAT, own numerators": {
        "mixers": {"a": ATTENTION},
        "ffns": {"f": {"kind": "kat", "hidden": 32, "groups": 4, "shared_numerator": False}},
    },
    "untied": {"mixers": {"a": ATTENTION}, "tie_embeddings": False},
}  # fmt: skip
NAMES = [*FAMILIES, *VARIANTS]


def model_of(name: str) -> Decoder:
    """In double precision, with weights that make every part of it show."""
    if name in VARIANTS:
        changes = {"ffns": {"f": {"kind": "swiglu", "hidden": 24}}, "layers": ["a + f x2"], **VARIANTS[name]}
        model = build("mixer attention", init_std=0.3, **changes)
    else:
        family = FAMILIES[name]
        changes = {
            part: {key: {**config, **WIDER.get(key, {})} for key, config in family[part].items()}
            for part in ("mixers", "ffns")
        }
        model = build(name, init_std=0.3, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
            parameter.data = parameter.data.double()  # buffers stay as they are: routers balance in fp32
    return model


def batches() -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(tokens, targets, cu_seqlens): two rows, then one packed row."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (2, 33), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 5:9] = -100
    packed = torch.randint(0, 256, (1, 33), generator=generator)
    borders = torch.tensor([0, 5, 6, 24, 32], dtype=torch.int32)
    return [(tokens[:, :-1], targets, None), (packed[:, :-1], packed[:, 1:], borders)]


Blocks = list[tuple[tuple[int, ...], Tensor]]
Held = dict[str, tuple[tuple[int, ...], Blocks]]


NONE: tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]] = ((), [])  # of a tensor that a rank has no part of


def held(tensors: Mapping[str, Tensor]) -> Held:
    """name -> (whole shape, this rank's blocks with their offsets)."""
    found: Held = {}
    for name, tensor in tensors.items():
        own, each = (tensor.held, tensor.cuts) if isinstance(tensor, Share) else (tensor, ())
        blocks = [(box.whole, box.of(local(own)).clone()) for box in boxes(own, each)]
        found[name] = (tuple(tensor.shape), blocks)
    return found


def assemble(ranks: list[Held]) -> dict[str, Tensor]:
    """The whole tensors. Whoever holds the same block must hold the same numbers, to the last bit."""
    whole: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        shape = next(rank for rank in ranks if name in rank)[name][0]
        tensor = torch.zeros(shape, dtype=next(block.dtype for rank in ranks for _, block in rank.get(name, NONE)[1]))
        seen = torch.zeros(shape, dtype=torch.bool)
        for rank in ranks:
            for offsets, block in rank.get(name, NONE)[1]:
                place = tuple(slice(start, start + size) for start, size in zip(offsets, block.shape))
                assert torch.equal(tensor[place].masked_select(seen[place]), block.masked_select(seen[place])), name
                tensor[place], seen[place] = block, True
        assert seen.all(), f"{name}: nobody holds {int((~seen).sum())} elements"
        whole[name] = tensor
    return whole


def gradients(model: nn.Module) -> dict[str, Tensor]:
    table = cuts(model)
    return {
        name: Share.of(parameter.grad, table.get(name, ()), name)
        for name, parameter in named_parameters(model)
        if parameter.grad is not None
    }


def mesh_of(rank: int, world: int, **sizes: Any) -> Mesh:
    return Mesh(MeshConfig(**sizes), Processes(rank, world, rank, torch.device("cpu")))


def run(model: Decoder, mesh: Mesh) -> dict[str, Any]:
    """Two steps of AdamW: losses, loads, norms, gradients of each step and the parameters afterwards."""
    rule = GradientRule(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    found: dict[str, Any] = {"loss": [], "load": [], "norm": [], "gradient": []}
    model.train()
    for tokens, targets, borders in batches():
        loss = model(tokens, targets=targets, cu_seqlens=borders) / (targets != -100).sum()
        loss.backward()
        rule.reduce()
        found["gradient"].append(held(gradients(model)))
        found["norm"].append(rule.clip(0.5))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loads = {name: mesh.processes.sum_(router.load.clone()) for name, router in model.routers().items()}
        for name, router in model.routers().items():
            router.rebalance(loads[name])
        found["loss"].append(loss.item())
        found["load"].append(loads)
    model.eval()
    with torch.no_grad():
        tokens = batches()[0][0]
        found["logits"], found["last"] = model(tokens), model(tokens, last_only=True)
    found["state"] = held(model_tensors(model))
    return found


def run_split(rank: int, world: int, names: list[str]) -> dict[str, dict[str, Any]]:
    mesh = mesh_of(rank, world, tp=world)
    results = {}
    for name in names:
        model = model_of(name)
        apply_tensor(model, mesh)
        share_loads(model, mesh)
        results[name] = run(model, mesh)
    return results


def run_whole(name: str) -> dict[str, Any]:
    return run(model_of(name), mesh_of(0, 1))
