"""Parameters that an engine must not take over: they are kept out of its optimizer and out of its sight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


def shared_out(optimizer: Optimizer, apart: set[nn.Parameter]) -> tuple[Optimizer, Optimizer | None]:
    """An optimizer -> (one without the parameters `apart`, one for them if there are any), each with the same settings."""
    sides: list[list[dict[str, Any]]] = [[], []]
    for group in optimizer.param_groups:
        for side, keep in zip(sides, (False, True)):
            if parameters := [parameter for parameter in group["params"] if (parameter in apart) == keep]:
                side.append({**group, "params": parameters})
    optimizer.param_groups[:] = sides[0]
    kind: Any = type(optimizer)
    return optimizer, kind(sides[1]) if sides[1] else None


@contextmanager
def hidden(model: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Within it, the model is without these parameters. They come back in their old order."""
    owners = [module for module in model.modules() if any(p in parameters for p in module._parameters.values())]
    whole = [dict(owner._parameters) for owner in owners]
    for owner, found in zip(owners, whole):
        for name, parameter in found.items():
            if parameter in parameters:
                del owner._parameters[name]
    try:
        yield
    finally:
        for owner, found in zip(owners, whole):
            owner._parameters.clear()
            owner._parameters.update(found)
