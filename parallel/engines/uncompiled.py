"""Imports a module without what `torch.compile` would import for it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def import_uncompiled(name: str) -> None:
    """Imports a module, if there is one of this name, with `torch.compile` doing nothing to its functions.

    As a decorator, `torch.compile` imports its whole compiler when the module is imported, which takes seconds, also where
    nobody ever calls the function. For modules that have to be there and whose functions nobody calls.
    """

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    with mock.patch.object(torch, "compile", unchanged), contextlib.suppress(ImportError):
        importlib.import_module(name)
