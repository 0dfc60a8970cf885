"""Attention on CPUs whose fp32 products go through oneDNN: the same numbers, and which library serves which lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, wide
from kernels.common import products
from tests.kernels.test_attention import assert_same, draw, offsets, operands, run, run_as

LIBRARIES: list[str] = []


@pytest.fixture(autouse=True)
def such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is; its own library multiplies."""
    LIBRARIES.clear()
    monkeypatch.setattr(products, "in_use", lambda: "onednn")
    monkeypatch.setattr(products, "choose", LIBRARIES.append)


@pytest.mark.parametrize(
    ("T", "S", "causal", "library"),
    [
        (5, 5, True, "blas"),
        (64, 64, True, "blas"),
        (256, 256, True, "onednn"),  # whole blocks, as fixed lengths of a batch often are
        (257, 257, True, "blas"),
        (767, 767, True, "blas"),
        (768, 768, True, "onednn"),
        (801, 801, True, "onednn"),  # filled up to 832
        (768, 768, False, "onednn"),
        (801, 801, False, "blas"),  # filling would be seen
        (3, 1000, False, "blas"),
    ],
)
def test_each_length_by_its_library_and_by_the_definition(
    T: int, S: int, causal: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(T, S, B=1, H=2, HKV=1, V=8, dtype=torch.float32)
    ours = run_as("chunked", monkeypatch, tensors, causal=causal)
    assert [library, library] == LIBRARIES  # forward and backward
    assert_same(ours, run_as("reference", monkeypatch, tensors, causal=causal), 1e-5)


@pytest.mark.parametrize("V", [6, 8, 11])
def test_documents_grouped_heads_and_unequal_widths(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(880, B=1, H=4, HKV=2, V=V, dtype=torch.float32)
    options = {"cu_seqlens": offsets(0, 1, 13, 64, 13, 0, 789)}
    ours = run_as("chunked", monkeypatch, tensors, **options)
    assert set(LIBRARIES) == {"blas", "onednn"}
    assert_same(ours, run_as("reference", monkeypatch, tensors, **options), 1e-5)


def test_bf16_is_kept_in_bf16_and_its_scores_are_summed_in_fp32() -> None:
    narrow = [x.bfloat16() for x in operands(800, B=1, H=2, HKV=2, V=8)]
    upstream = draw(1, 800, 2, 8, seed=3).bfloat16()
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in narrow]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            o = attention(*leaves)
        results.append([o, *torch.autograd.grad(o, leaves, upstream.to(dtype))])
        if dtype == torch.bfloat16:
            assert {x.dtype for x in kept if x.dim() == 4} == {torch.bfloat16}
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        # o is rounded before the backward pass reads it, and each result once.
        assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_fp64_and_masks_go_their_usual_way() -> None:
    run(operands(5))
    run(operands(20, B=1, dtype=torch.float32), window=3)
    run(operands(3, 9, dtype=torch.float32))  # a mask: the last 3 of 9 positions
    assert LIBRARIES == ["blas", "blas"]  # the causal first queries of the window


def test_what_was_chosen_before_is_in_force_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "choose", lambda library: torch.set_float32_matmul_precision("highest"))
    with products.kept():
        torch.set_float32_matmul_precision("medium")
        q, k, v = (x.requires_grad_() for x in operands(5, dtype=torch.float32, V=8))
        o = wide.attention(*(x.transpose(1, 2) for x in (q, k, v)), 1.0, True)
        assert torch.get_float32_matmul_precision() == "medium"
        o.sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
