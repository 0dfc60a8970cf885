"""What tests of operators on rows share: draws, a function's value and gradient, blocks that are smaller than the rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same ones (but for rounding) for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """[y, dx] for an upstream gradient of draws."""
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, draw(*y.shape, dtype=y.dtype, seed=1))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Values, dtypes and shapes."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def blocks(module: ModuleType, limit: str, size: int) -> Any:
    """A fixture: with the block size module.limit as it is, and with one so small that few rows are many blocks."""

    @pytest.fixture(params=[None, size], ids=["one block", "many blocks"])
    def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param:
            monkeypatch.setattr(module, limit, request.param)

    return block
