"""Routing: the fast form against the definition, by hand, gradients, groups, refusals."""

import pytest
import torch

from kernels.experts import route
from kernels.experts.routing import Rule
from kernels.experts.routing_chunked import route_chunked
from kernels.experts.routing_reference import route_reference

RULES = [
    Rule(top_k, gate, normalize, 1.5, groups, top_groups)
    for gate in ("softmax", "sigmoid")
    for normalize in (False, True)
    for top_k, groups, top_groups in ((1, 1, 1), (3, 1, 1), (2, 4, 2), (8, 1, 1))
]


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


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fast_form_is_the_definition(rule, dtype, tolerance):
    logits, bias = draw(13, 8).to(dtype), draw(8, seed=1).to(dtype) * 0.1
    for given in (bias, None):
        ours, wanted = run(route_chunked, logits, given, rule), run(route_reference, logits, given, rule)
        assert torch.equal(ours[0], wanted[0])
        for a, b in zip(ours[1:], wanted[1:], strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradcheck(rule):
    logits = draw(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route_chunked(z, None, rule)[1], logits)


def test_by_hand():
    probability = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    indices, weights = route(probability.log(), top_k=2, normalize=True, scale=2.0)
    assert indices[0, 0] == 0 and indices[0, 1] in (1, 2)
    torch.testing.assert_close(weights, torch.tensor([[2 * 0.5 / 0.7, 2 * 0.2 / 0.7]], dtype=torch.float64))
    # The bias chooses the last one, which weighs what it weighed; the first of equals where one is chosen.
    bias = torch.tensor([0.0, 0.0, 0.0, 0.45], dtype=torch.float64)
    indices, weights = route(probability.log(), bias, top_k=1)
    assert indices.tolist() == [[3]]
    torch.testing.assert_close(weights, torch.tensor([[0.1]], dtype=torch.float64))
    assert route(torch.zeros(1, 5), top_k=1)[0].tolist() == [[0]]
    # Two groups of two: 0.5 + 0.1 against 0.45 + 0.4.
    scores = torch.tensor([[0.5, 0.1, 0.45, 0.4]], dtype=torch.float64)
    indices, weights = route(torch.logit(scores), top_k=1, gate="sigmoid", groups=2, top_groups=1)
    assert indices.tolist() == [[2]] and weights.item() == pytest.approx(0.45)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, 3, 8)}, "logits must be floating point"),
        ({"bias": torch.zeros(7)}, r"bias must be \[E\]"),
        ({"gate": "relu"}, "gate='relu' is unknown; choose one of softmax"),
        ({"top_k": 9}, "top_k=9 must lie in 1..8"),
        ({"groups": 3}, "groups=3, top_groups=1 do not fit 8 experts"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "top_k=3 must lie in 1..2"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        route(**({"logits": torch.zeros(2, 8), "top_k": 2} | change))
