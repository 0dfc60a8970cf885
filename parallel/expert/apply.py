"""Applies expert parallelism to a model from outside: shares out its experts, and gives its sparse layers a dispatcher.

A sparse layer is a module with
    expert_splits() -> {parameter name: splits}   over ep (which experts) and over tp (which part of each one's hidden width)
    dispatch                                      replaced by the dispatcher
    experts                                       their number
    routes_by_token                               False: it needs whole sequences, so with tp it is a unit (parallel/tensor.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parallel.expert.dispatch import AllToAllExperts, ExpertTensor
from parallel.layout import Split, record
from parallel.mesh import Mesh

MOST = 64  # sizes above are not listed in messages


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every layer with experts."""
    for name, module in model.named_modules():
        if hasattr(module, "expert_splits"):
            yield name, module


def check_experts(model: nn.Module, ep: int, tp: int = 1, expert_tensor: bool = False) -> None:
    """Raises ValueError, naming the setting and the sizes that fit, unless `apply_experts` works for these sizes.

    model: looked at, not computed with; it may be on the meta device.
    """
    if ep == 1 and not expert_tensor:
        return
    layers = list(sparse_layers(model))
    if not layers:
        wish = f"mesh.ep={ep}" if ep > 1 else "mesh.expert_tensor=true"
        raise ValueError(f"{wish} shares out experts, but the model has none; leave it out")
    for name, layer in layers:
        if ep > 1 and tp > 1 and not layer.routes_by_token:
            raise ValueError(
                f"mesh.ep={ep} with mesh.tp={tp}: {name} ({type(layer).__name__}) routes whole sequences, so tp shares out its "
                "experts; set mesh.ep=1 or mesh.tp=1"
            )
    sizes = {"ep": ep, "tp": tp if expert_tensor else 1}
    splits = [
        (name, layer, split)
        for name, layer in layers
        if tp == 1 or layer.routes_by_token
        for each in layer.expert_splits().values()
        for split in each
    ]
    for name, layer, split in splits:
        obstacle = split.obstacle(sizes[split.axis])
        if obstacle is not None:
            others = [other for _, _, other in splits if other.axis == split.axis]
            valid = (str(n) for n in range(1, MOST + 1) if all(other.obstacle(n) is None for other in others))
            raise ValueError(
                f"{obstacle} of {name} ({type(layer).__name__}) cannot be cut over mesh.{split.axis}={sizes[split.axis]}; "
                f"this model allows mesh.{split.axis} {', '.join(valid)}"
            )


def apply_experts(model: nn.Module, mesh: Mesh) -> None:
    """Keeps this rank's experts out of the whole model's, the same on all ranks, and has tokens brought to theirs.

    Call it after the tensor-parallel cut, and before the engine and the optimizer see the parameters. These keep
    their names; how they are cut is recorded (parallel/layout.py). A gradient of theirs is the sum over the tokens of all ranks
    that share out the experts; what is left to sum is mesh.group("edp"), those that hold the same ones. Raises ValueError as
    `check_experts`.
    """
    axes = {axis for axis in ("ep", "tp") if mesh.size(axis) > 1 and (axis == "ep" or mesh.grid.expert_tensor)}
    if not axes or not any(True for _ in sparse_layers(model)):  # a pipeline stage may have none
        return
    check_experts(model, mesh.size("ep"), mesh.size("tp"), mesh.grid.expert_tensor)
    for _, layer in sparse_layers(model):
        if mesh.size("tp") > 1 and not layer.routes_by_token:
            continue
        used = {
            name: tuple(split for split in splits if split.axis in axes)
            for name, splits in layer.expert_splits().items()
        }
        for name, splits in used.items():
            whole = getattr(layer, name)
            setattr(layer, name, nn.Parameter(_part(whole.detach(), splits, mesh), whole.requires_grad))
        record(layer, used, mesh)
        layer.dispatch = _dispatcher(mesh, layer.experts, layer.dispatch)


@torch.no_grad()
def _part(whole: Tensor, splits: tuple[Split, ...], mesh: Mesh) -> Tensor:
    for split in splits:
        whole = split.take(whole, mesh.rank(split.axis), mesh.size(split.axis))
    return whole


def _dispatcher(mesh: Mesh, experts: int, local: Any) -> Any:
    tp, ep = mesh.group("tp") if mesh.grid.expert_tensor else None, mesh.group("ep")
    # Tokens go to the ep rank first and are gathered over tp there: each row then crosses the ep group once, not tp times.
    inner = local if tp is None else ExpertTensor(tp, local)
    return inner if ep is None else AllToAllExperts(ep, experts, inner)
