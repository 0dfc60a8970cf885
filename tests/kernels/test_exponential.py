"""e^x in place is e^x, by whichever of torch's functions."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.common import exponential, products


@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_exponential(library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "in_use", lambda: library)
    x = torch.linspace(-60, 20, 1001, dtype=dtype)
    found = exponential.exp_(x.clone())
    assert found.dtype == dtype
    error = ((found.double() - x.double().exp()) / x.double().exp()).abs()
    assert error.max() < (5e-6 if dtype == torch.float32 else 1e-15)
    assert error[x.abs() < 1].max() < (2e-7 if dtype == torch.float32 else 1e-15)
    ends = torch.tensor([-math.inf, 0.0, math.inf], dtype=dtype)
    assert exponential.exp_(ends) is ends and ends.tolist() == [0.0, 1.0, math.inf]


def test_two_to_the_x_serves_fp32_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponential, "LOG2E", 0.0)  # shows which one is taken
    results = []
    for library in ("blas", "onednn"):
        monkeypatch.setattr(products, "in_use", lambda library=library: library)
        results.append(
            [exponential.exp_(torch.ones(1, dtype=dtype)).item() for dtype in (torch.float32, torch.float64)]
        )
    assert results[0] == pytest.approx([math.e, math.e]) and results[1] == pytest.approx([1.0, math.e])
