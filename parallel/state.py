"""A model and its optimizer as one flat dictionary of named tensors, and back.

    model/<parameter or persistent buffer>
    optimizer/<parameter>/<key>            exp_avg, exp_avg_sq, momentum_buffer, step, ...

Names and shapes are those of the whole model. They do not depend on how it is wrapped, cut, sharded or compiled, nor on the
engine, so neither does a checkpoint. Where two pipeline stages of this rank hold a copy each of one parameter, its name
stands for the first copy, and loading fills both. The tensors are the live ones (plain, DTensor for a sharded parameter,
Share for one that tensor or expert parallelism has cut), so that loading is: make the dictionary, have it filled in place,
and hand it to the `load_*` functions, which put back what was not a tensor or is a second copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.layout import Cuts, cuts, local, plain_name
from parallel.share import Share

Optimizers = Optimizer | Iterable[Optimizer]


def _root(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once (a tied one under its first name), by its name free of wrappers, in the model's order.

    Copies of one parameter in two pipeline stages have one name.
    """
    _reshard(model)
    for name, parameter in _root(model).named_parameters():
        yield plain_name(name), parameter


def _reshard(model: nn.Module) -> None:
    # After a forward pass without backward (evaluation), FSDP2 may hold whole parameters in place of the sharded ones,
    # and those are neither what the optimizer knows nor what stays.
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model/<name>` -> every parameter and persistent buffer, detached and sharing memory with the model's own."""
    return _first_copies(_model_tensors(model))


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    table = cuts(_root(model))
    for name, parameter in named_parameters(model):
        yield f"model/{name}", Share.of(parameter.detach(), table.get(name, ()), name)
    seen: set[int] = set()
    for prefix, module in _root(model).named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield "model/" + plain_name(f"{prefix}.{name}" if prefix else name), buffer.detach()


def _first_copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        found.setdefault(name, tensor)
    return found


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model. Entries that share the model's memory (filled in place) are left alone.

    Raises ValueError if a name of the model is absent from `tensors`; other names are not looked at.
    """
    own = list(_model_tensors(model))
    _require([name for name, _ in own], tensors)
    for name, tensor in own:
        _copy(tensor, tensors[name])


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """`optimizer/<parameter>/<key>` -> the optimizer's state, for every parameter that it updates.

    optimizer: one, or several that share out the model's parameters. A parameter without state yet gets zero state
    first, of the kind its optimizer makes, so that the names are the same before the first step and after it. Numbers
    become tensors of zero dims (float64, int64 or bool); those are copies. Hyperparameters are not state: they come
    from the configuration. Raises ValueError if the optimizer updates a parameter that the model does not have.
    """
    table = cuts(_root(model))
    return _first_copies(
        item
        for name, parameter, state in _states(model, optimizer)
        for item in _state_tensors(name, parameter, state, table.get(name, ())).items()
    )


def _state_tensors(name: str, parameter: nn.Parameter, state: Mapping[str, Any], each: Cuts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"optimizer/{name}/{key}"] = _share(f"{name}/{key}", value, each, parameter.shape)
        elif isinstance(value, (bool, int, float)):
            tensors[f"optimizer/{name}/{key}"] = torch.tensor(value, dtype=_number_dtype(value))
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` (from `optimizer_tensors`, filled since) back into the optimizer's state.

    Raises ValueError if a name of the optimizer's state is absent from `tensors`; other names are not looked at.
    """
    _require(optimizer_tensors(model, optimizer), tensors)
    table = cuts(_root(model))
    for name, parameter, state in _states(model, optimizer):
        own = _state_tensors(name, parameter, state, table.get(name, ()))
        for key, value in state.items():
            if isinstance(value, Tensor):
                _copy(own[f"optimizer/{name}/{key}"], tensors[f"optimizer/{name}/{key}"])
            elif isinstance(value, (bool, int, float)):
                state[key] = type(value)(tensors[f"optimizer/{name}/{key}"].item())


def _states(model: nn.Module, optimizer: Optimizers) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    names = {parameter: name for name, parameter in named_parameters(model)}
    for one in [optimizer] if isinstance(optimizer, Optimizer) else optimizer:
        parameters = [p for group in one.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that the model does not "
                    "have: build the optimizer after the model has been sharded"
                )
        make_zero_state(one)
        for parameter in parameters:
            yield names[parameter], parameter, one.state[parameter]


@torch.no_grad()
def make_zero_state(optimizer: Optimizer) -> None:
    """Give every parameter that has no optimizer state yet the state it would have had before the first step: zeros.

    Only the optimizer knows its state, so it makes one step with zero gradients, zero learning rate and zero weight
    decay on those parameters; then the new state is zeroed, the step count included. Collective if the optimizer's
    step is. Right for optimizers whose state begins at zero (AdamW, LAMB, Muon, SGD with momentum and no dampening); raises
    ValueError for one that shows another beginning (NAdam).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    fresh = [p for p in parameters if not optimizer.state.get(p)]
    if not fresh:
        return
    gradients = {p: p.grad for p in parameters}
    settings: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "weight_decay") if key in group} for group in optimizer.param_groups
    ]
    try:
        for parameter in parameters:
            parameter.grad = None
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)
        for group, setting in zip(optimizer.param_groups, settings):
            for key, value in setting.items():
                group[key] = torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)
        type(optimizer).step(optimizer)  # the class's own: a scheduler counts calls of the instance's
    finally:
        for group, setting in zip(optimizer.param_groups, settings):
            group.update(setting)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    for parameter in fresh:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, (Tensor, bool, int, float)) and not _zero_but_for_a_count(value):
                raise ValueError(
                    f"{type(optimizer).__name__} does not begin with zero state (its {key} is something else), so it "
                    "cannot be checkpointed before its first step; use AdamW, or another optimizer that does"
                )
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, (bool, int, float)):
                state[key] = type(value)(0)


def _zero_but_for_a_count(value: Tensor | float) -> bool:
    """True if nothing but counting can have made `value` out of zero in one step without gradient."""
    if isinstance(value, Tensor) and value.dim() > 0:
        local = value.to_local() if isinstance(value, DTensor) else value
        return not local.any()
    return float(value) in (0.0, 1.0)


def _number_dtype(value: float) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float64


def _share(name: str, value: Tensor, each: Cuts, shape: torch.Size) -> Tensor:
    """A tensor of a parameter's optimizer state: cut like the parameter, or a number."""
    if each and value.dim() > 0 and value.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} for a parameter of {tuple(shape)}: tensor and expert parallelism know how "
            "to save state of the parameter's own shape; use another optimizer, or mesh.tp=1 and mesh.ep=1"
        )
    return Share.of(value.detach(), each if value.dim() > 0 else (), name)


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    if target is source or _same_memory(target, source):
        return
    if isinstance(target, Share):
        target.fill(source)
    else:
        target.copy_(source)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    local_a, local_b = (local(t.held if isinstance(t, Share) else t) for t in (a, b))
    return local_a.numel() > 0 and local_a.data_ptr() == local_b.data_ptr() and local_a.device == local_b.device


def _require(own: Iterable[str], given: Mapping[str, Tensor]) -> None:
    missing = sorted(set(own) - given.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:10])}")
