"""The Triton routing against its definition in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.experts.routing import Rule
from kernels.experts.routing_reference import route_reference
from kernels.experts.triton_routing import route_triton


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(form, logits, bias, rule):
    leaf = logits.clone().requires_grad_()
    indices, weights = form(leaf, bias, rule)
    return (
        indices,
        weights.detach(),
        torch.autograd.grad(weights, leaf, draw(*weights.shape, seed=2).to(weights.dtype))[0],
    )


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "N, E, k, groups, top_groups",
    [(13, 8, 3, 1, 1), (5, 17, 1, 1, 1), (70, 32, 2, 4, 2), (3, 5, 5, 1, 1), (9, 16, 4, 8, 3), (2, 1, 1, 1, 1)],
)
def test_decisions_and_gradients(gate, normalize, N, E, k, groups, top_groups):
    rule = Rule(k, gate, normalize, 2.5, groups, top_groups)
    logits, bias = draw(N, E).float(), draw(E, seed=1).float() * 0.1
    for given in (bias, None):
        ours = run(route_triton, logits, given, rule)
        wanted = run(route_reference, logits.double(), None if given is None else given.double(), rule)
        assert torch.equal(ours[0], wanted[0])
        for a, b in zip(ours[1:], wanted[1:], strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


def test_what_is_not_a_number_chooses_valid_experts_and_no_tokens_choose_nothing():
    logits = torch.full((3, 6), float("nan"))
    indices, _ = route_triton(logits, None, Rule(4, "softmax", True, 1.0, 1, 1))
    assert all(sorted(set(row)) == sorted(row) and max(row) < 6 for row in indices.tolist())
    indices, weights, gradient = run(route_triton, torch.empty(0, 4), None, Rule(2, "softmax", True, 1.0, 1, 1))
    assert indices.shape == weights.shape == (0, 2) and gradient.shape == (0, 4)
