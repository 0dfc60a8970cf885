"""Which library multiplies fp32 matrices: the choice, and that it never costs accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from kernels.common import products


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    with products.kept():
        yield
    products.why_not_onednn.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, amx: bool, error: float = 1e-7) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(products, "_error", lambda: error)
    products.why_not_onednn.cache_clear()


AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@pytest.mark.parametrize(
    ("processor", "chosen"),
    [
        ((AMD, "AVX512", False), "onednn"),
        ((AMD, "AVX2", False), "blas"),  # MKL uses all that there is
        ((INTEL, "AVX512", False), "blas"),
        ((INTEL, "AVX512", True), "blas"),
        ((AMD, "AVX512", True), "blas"),  # where oneDNN would round
        ((AMD, "AVX512", False, 3e-3), "blas"),  # where it does although nothing says so
    ],
)
def test_the_choice(processor: tuple[str, str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, *processor)
    assert products.choose("auto") == chosen
    assert torch.get_float32_matmul_precision() == {"onednn": "medium", "blas": "highest"}[chosen]
    assert products.choose("blas") == "blas"
    assert torch.get_float32_matmul_precision() == "highest"


def test_onednn_is_refused_where_it_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INTEL, "AVX512", amx=False)
    assert products.choose("onednn") == "onednn"  # the user's word
    products.choose("blas")
    pretend(monkeypatch, INTEL, "AVX512", amx=True)
    with pytest.raises(ValueError, match=r"here: on processors with matrix tiles \(AMX\) .*; leave this to auto"):
        products.choose("onednn")
    pretend(monkeypatch, AMD, "AVX512", amx=False, error=3e-3)
    with pytest.raises(ValueError, match="a product was wrong by 3e-03 of its largest entry"):
        products.choose("onednn")
    assert torch.get_float32_matmul_precision() == "highest"


def test_factors_rounded_to_bf16_show() -> None:
    assert products._error() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert products._error() > 1e-3


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (33, 129, 65), (257, 96, 31), (1000, 17, 300)])
def test_a_linear_layer_keeps_fp32_accuracy(sizes: tuple[int, int, int]) -> None:
    """Whatever this machine chooses: the product and both gradients against fp64."""
    products.choose("auto")
    tokens, width, out = sizes
    chance = torch.Generator().manual_seed(0)

    def operands(dtype: torch.dtype) -> list[torch.Tensor]:
        chance.manual_seed(0)
        shapes = (tokens, width), (out, width), (tokens, out)
        return [torch.randn(shape, generator=chance).to(dtype) for shape in shapes]

    results = []
    for dtype in (torch.float32, torch.float64):
        x, weight, dy = operands(dtype)
        y = functional.linear(x.requires_grad_(), weight.requires_grad_())
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for found, exact in zip(*results):
        assert (found - exact).abs().max() <= 3e-6 * exact.abs().max()


def test_what_is_chosen_in_a_context_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AMD, "AVX512", amx=False)
    with products.kept():
        products.choose("auto")
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
