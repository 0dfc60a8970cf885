"""The part of a layer that one rank has, and what stands for the ranks around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.expert.apply import sparse_layers
from parallel.tensor import units
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.stand_in.collectives import Across, Gather, Share
from pretrain.estimate.stand_in.experts import Experts
from pretrain.estimate.stand_in.notes import Notes, size


def cut(block: nn.Module, cutting: Cutting) -> None:
    """A block on the meta device -> the first tensor-parallel rank's part of it, with the first ranks' experts."""
    tp = cutting.tp
    if tp > 1:
        for name, unit in list(units(block)):
            owner, _, own = name.rpartition(".")
            setattr(block.get_submodule(owner), own, unit.part(0, tp))
    sizes = {"ep": cutting.ep, "tp": tp if cutting.expert_tensor else 1}
    for _, layer in sparse_layers(block):
        if not any(n > 1 for n in sizes.values()) or (tp > 1 and not layer.routes_by_token):
            continue
        for name, splits in layer.expert_splits().items():
            part = getattr(layer, name).detach()
            for split in splits:
                part = split.take(part, 0, sizes[split.axis])
            setattr(layer, name, nn.Parameter(part))


def connect(block: nn.Module, cutting: Cutting, notes: Notes) -> None:
    """Gives a cut block's layers what stands for their neighbours. Before recomputation is applied, as in a run."""
    ranks = cutting.tp
    for _, layer in sparse_layers(block):
        local = ranks > 1 and not layer.routes_by_token
        layer.dispatch = Experts(notes, layer.experts, Cutting() if local else cutting)
    for module in block.modules():
        held: Any = module
        if hasattr(module, "reduce_load"):
            held.reduce_load = partial(_reduce_load, notes)
        if ranks > 1 and getattr(module, "contextual", False) and not _is_unit(module):
            module.register_forward_pre_hook(partial(_part_of_sequence, ranks))
    if ranks > 1:
        for _, unit in list(units(block)):
            unit.across = partial(_across, notes)
            unit.register_forward_pre_hook(partial(_gather_tokens, notes, ranks))
            unit.register_forward_hook(partial(_scatter_sum, notes, ranks))


def _is_unit(module: Any) -> bool:
    return any(split.axis == "tp" for split in module.splits().values())


def _reduce_load(notes: Notes, counts: Tensor) -> Tensor:
    notes.send("dp_cp_tp", "all_reduce", "loads of experts", size(counts))
    return counts.clone()


def _across(notes: Notes, x: Tensor) -> Tensor:
    y: Tensor = Across.apply(notes, x)
    return y


def _part_of_sequence(ranks: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, sequence, *others = args
    return (x, sequence.part(ranks), *others)


def _gather_tokens(notes: Notes, ranks: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    if torch.is_autocast_enabled("cpu") and not module.reads_wide:
        x = x.to(torch.get_autocast_dtype("cpu"))
    return (Gather.apply(notes, ranks, x), *others)


def _scatter_sum(notes: Notes, ranks: int, module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (Share.apply(notes, ranks, output[0], "results"), *output[1:])
    return Share.apply(notes, ranks, output, "results")
