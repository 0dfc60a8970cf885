"""Operators that torch.compile calls and does not look into.

Their fast forms are made by hand: they read borders and loads on the host, have backward passes of their own, and launch Triton
kernels. Traced, each packing of a row would be another program. So what is compiled of a layer ends before such an operator and
goes on behind it, and depends on the shapes of activations only.
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import kernels

F = TypeVar("F", bound=Callable[..., Any])

_compiling = False  # whether anything is compiled in this process


def opaque(function: F) -> F:
    """A decorator: within torch.compile, `function` and all that it calls run as they are written."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not _compiling:  # importing the compiler takes seconds
            return function(*args, **kwargs)
        if disabled is None:
            import torch

            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return called  # type: ignore[return-value]


def prepare() -> None:
    """Makes opaque functions so, for the rest of this process. Call it before anything is compiled."""
    from torch._dynamo import trace_rules

    global _compiling
    if _compiling:
        return
    _compiling = True
    trace_rules.add(__name__)  # the wrapper itself is nothing to trace either
    # Operators that are traced take their reference forms (see kernels/dispatch.py), and no import can be traced.
    for package in pkgutil.iter_modules(kernels.__path__, "kernels."):
        if package.ispkg and importlib.util.find_spec(f"{package.name}.reference") is not None:
            importlib.import_module(f"{package.name}.reference")
