"""The Triton experts against their definition in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import tuning
from kernels.experts import triton_sort
from kernels.experts.activations import ACTIVATIONS
from kernels.experts.reference import experts as reference
from kernels.experts.triton import experts_triton


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(N, D, E, F, k, gated=True):
    width = 2 * F if gated else F
    indices = torch.rand(N, E, generator=torch.Generator().manual_seed(9)).topk(min(k, E), dim=-1).indices
    return [
        draw(N, D),
        draw(E, D, width, seed=1) * D**-0.5,
        draw(E, F, D, seed=2) * F**-0.5,
        draw(N, k, seed=3),
    ], indices


def run(function, tensors, indices, activation="silu"):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves[:3], indices, leaves[3], activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, seed=4).to(y.dtype))]


def assert_close(tensors, indices, tolerance=1e-6, dtype=torch.float32, **options):
    rounded = [t.to(dtype) for t in tensors]
    wanted = run(reference, [t.double() for t in rounded], indices, **options)
    for got, true in zip(run(experts_triton, rounded, indices, **options), wanted, strict=True):
        assert got.dtype == dtype and got.shape == true.shape
        assert relative(got, true) < tolerance


@pytest.mark.parametrize(
    "activation, gated", [*((activation, True) for activation in ACTIVATIONS), ("gelu", False), ("relu2", False)]
)
def test_activations(activation, gated):
    assert_close(*operands(9, 20, 2, 12, 2, gated), activation=activation)


@pytest.mark.parametrize(
    "N, D, E, F, k",
    [
        (70, 72, 5, 70, 2),  # several tiles in every direction, none of them full
        (40, 64, 4, 64, 1),  # whole tiles; one choice is not summed
        (3, 33, 17, 5, 3),  # more experts than fit a small table, most of them empty
        (150, 16, 2, 130, 1),  # several tiles of rows of one expert
        (1, 7, 1, 3, 1),
        (5, 70, 6, 66, 5),
    ],
)
def test_awkward_shapes(N, D, E, F, k):
    assert_close(*operands(N, D, E, F, k))


ROUTINGS = {
    "all to the last": lambda n, k: torch.full((n, k), 4),
    "all to the first": lambda n, k: torch.zeros(n, k, dtype=torch.int64),
    "first and last empty": lambda n, k: torch.arange(n * k).view(n, k) % 3 + 1,
    "one expert twice for each token": lambda n, k: torch.arange(n)[:, None].expand(n, k) % 5,
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_empty_and_crowded_experts(routing):
    tensors, _ = operands(45, 10, 5, 6, 2)
    indices = ROUTINGS[routing](45, 2)
    assert_close(tensors, indices)
    gradients = run(experts_triton, [t.float() for t in tensors], indices)[2:4]
    empty = torch.bincount(indices.flatten(), minlength=5) == 0
    for gradient in gradients:
        assert torch.equal(gradient[empty], torch.zeros_like(gradient[empty]))


def test_half_precision():
    tensors, indices = operands(33, 40, 4, 24, 2)
    assert_close(tensors, indices, tolerance=2e-3, dtype=torch.float16)


def test_parameters_in_another_dtype_keep_their_gradients_in_it():
    tensors, indices = operands(17, 20, 2, 12, 2)
    x, *parameters = [t.half() for t in tensors]
    wide = [x, *(t.float() for t in parameters)]
    got, narrow = run(experts_triton, wide, indices), run(experts_triton, [x, *parameters], indices)
    for a, b in zip(got[2:], narrow[2:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.half(), b, atol=0, rtol=1e-3)
    assert torch.equal(got[0], narrow[0]) and torch.equal(got[1], narrow[1])


def test_frozen_operands_and_no_gradient_at_all():
    tensors, indices = operands(12, 10, 2, 6, 2)
    single = [t.float() for t in tensors]
    y, *whole = run(experts_triton, single, indices)
    for frozen in range(4):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(single)]
        experts_triton(*leaves[:3], indices, leaves[3], activation="silu").backward(draw(12, 10, seed=4).float())
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, whole[i])
    assert torch.equal(experts_triton(*single[:3], indices, single[3], activation="silu"), y)


def test_no_tokens_and_strided_operands():
    tensors, indices = operands(0, 6, 3, 4, 2)
    y, *gradients = run(experts_triton, [t.float() for t in tensors], indices)
    assert y.shape == (0, 6) and not any(g.any() for g in gradients)
    tensors, indices = operands(12, 10, 2, 6, 2)
    views = [t.float().mT.contiguous().mT for t in tensors]
    got = run(experts_triton, views, indices.T.contiguous().T)
    for a, b in zip(got, run(experts_triton, [t.float() for t in tensors], indices), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("P, k, E", [(1, 1, 1), (40, 2, 3), (300, 4, 8), (700, 1, 31)])
def test_sorted_choices_are_those_of_a_stable_sort(P, k, E, monkeypatch):
    monkeypatch.setitem(triton_sort.DEFAULTS["experts_sort"], "generic", {"BLOCK": 16, "LOOK": 2, "num_warps": 4})
    tuning.forget()
    indices = torch.randint(E, (P // k, k), generator=torch.Generator().manual_seed(1))
    where = triton_sort.sort(indices, E, 16)
    tuning.forget()
    flat = indices.flatten()
    assert where.order.tolist() == flat.argsort(stable=True).tolist()
    counts = torch.bincount(flat, minlength=E)
    begins = [0, *counts.cumsum(0).tolist()]
    tiles = [0, *((counts + 15) // 16).cumsum(0).tolist()]
    assert where.table[0, : E + 1].tolist() == begins
    assert where.table[1, : E + 1].tolist() == tiles
    assert tiles[-1] <= where.tiles
