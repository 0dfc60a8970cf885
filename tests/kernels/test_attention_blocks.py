"""Causal attention by blocks on one thread: the definition's numbers at lengths that fill blocks and parts, and others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import blocks, reference, wide
from kernels.common import products


def drawn(T: int, group: int, dtype: torch.dtype, heads: int = 2, width: int = 8) -> list[Tensor]:
    """q, k, v, do as views of [B, T, H, K], as models hold them."""
    generator = torch.Generator().manual_seed(T + group)
    counts = (heads * group, heads, heads, heads * group)
    return [torch.randn(2, T, n, width, generator=generator).to(dtype).transpose(1, 2) for n in counts]


def defined(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> list[Tensor]:
    """o, dq, dk, dv in fp64."""
    leaves = [x.double().transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    o = reference.attention(*leaves, scale=scale, causal=True, window=None, cu_seqlens=None, cu_seqlens_k=None)
    gradients = torch.autograd.grad(o, leaves, do.double().transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (o, *gradients)]


def ours(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> list[Tensor]:
    o, logsumexp = blocks.forward(q, k, v, scale)
    assert logsumexp.dtype == torch.float32
    return [o, *blocks.backward(do, q, k, v, o, logsumexp, scale)]


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-3)).item()  # of one key dq and dk are 0


@pytest.mark.parametrize(
    ("T", "group"),
    [(1, 1), (5, 2), (64, 3), (200, 4), (256, 1), (300, 1), (257, 2), (640, 8), (1024, 2), (1300, 1), (2240, 3)],
)
def test_fp32_is_the_definition(T: int, group: int) -> None:
    q, k, v, do = drawn(T, group, torch.float32)
    for found, wanted in zip(ours(q, k, v, do, 0.3), defined(q, k, v, do, 0.3), strict=True):
        assert found.dtype == torch.float32 and error(found, wanted) < 2e-6


@pytest.mark.parametrize(("T", "group"), [(70, 2), (512, 1), (1300, 2)])
def test_bf16_rounds_probabilities_and_results_only(T: int, group: int) -> None:
    q, k, v, do = drawn(T, group, torch.bfloat16, width=32)
    o, *gradients = zip(ours(q, k, v, do, 0.2), defined(q, k, v, do, 0.2), strict=True)
    assert error(*o) < 2e-3  # its own rounding makes 1.7e-3
    for found, wanted in gradients:
        assert found.dtype == torch.bfloat16 and error(found, wanted) < 3.9e-3  # one bit of bf16


def test_fp16_is_computed_in_fp32() -> None:
    q, k, v, do = drawn(300, 2, torch.float16)
    for found, wanted in zip(ours(q, k, v, do, 0.3), defined(q, k, v, do, 0.3), strict=True):
        assert found.dtype == torch.float16 and error(found, wanted) < 5e-4


@pytest.mark.parametrize("T", [256, 1300])
def test_later_keys_may_be_as_large_as_they_like(T: int) -> None:
    """What a query must not see would overflow its sum, or hide all that it sees below what fp32 can hold."""
    q, k, v, do = drawn(T, 2, torch.float32)
    q, k = q.abs(), k.abs() * torch.linspace(0, 60, T)[:, None]
    results = ours(q, k, v, do, 1.0)
    for found, wanted in zip(results, defined(q, k, v, do, 1.0), strict=True):
        assert found.isfinite().all() and error(found, wanted) < 1e-4  # scores of thousands are known to a few 1e-4


def test_only_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    forward = blocks.forward

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        called.append(q.shape[2])
        return forward(q, k, v, scale)

    monkeypatch.setattr(blocks, "forward", counted)
    monkeypatch.setattr(products, "choose", lambda library: library)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for T, causal in ((255, True), (256, True), (800, True), (1024, False)):
            q, k, v, _ = drawn(T, 1, torch.float32)
            o = wide.attention(q, k, v, 0.3, causal)
            assert o.shape == q.shape
    assert called == [256, 832]


def test_a_block_that_is_not_full_adds_few_shapes() -> None:
    """oneDNN compiles a kernel for each: all lengths up to 8192 that are multiples of 64 need no more than these."""
    shapes = {
        (last - first, end - start)
        for T in range(64, 8193, 64)
        for first, last, parts in blocks._blocks(T, 2)
        for start, end in parts
    }
    lengths = (256, 512, 768, 1024)
    assert shapes == {(rows, n) for rows in (64, 128, 192, 256) for n in lengths} | {(64, 64), (128, 128), (192, 192)}
    for T, group in ((1300, 1), (2240, 3), (64, 8)):
        for first, last, parts in blocks._blocks(T, group):
            assert [0, *(end for _, end in parts)] == [*(start for start, _ in parts), last] and first < last
