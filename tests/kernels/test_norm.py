"""The norms: fast form against the definition and torch's own, gradients, extremes, blocks of rows."""

import pytest
import torch
import torch.nn.functional as F

from kernels.dispatch import Request, explain
from kernels.norm import (
    RMS_NORM_FORMS,
    add_rms_norm,
    chunked,
    gated_rms_norm,
    l2_norm,
    reference,
    residual,
    rms_norm,
)
from tests.kernels.row_cases import assert_same, blocks

block = blocks(chunked, "BLOCK_ELEMENTS", 40)
GATES = [(activation, first) for activation in ("silu", "sigmoid") for first in (True, False)]


def inputs(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(*shape), draw(*shape), draw(shape[-1])


def values_and_gradients(function, leaves):
    y = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 8), (11, 1), (5,)])
def test_chunked_is_the_definition(shape, dtype, tolerance, block):
    x, gate, weight = inputs(shape, dtype)
    pairs = [
        (chunked.rms_norm_chunked, reference.rms_norm_reference, (x, weight), {}),
        (chunked.l2_norm_chunked, reference.l2_norm_reference, (x,), {}),
    ]
    for activation, norm_first in GATES:
        options = {"eps": 1e-5, "activation": activation, "norm_first": norm_first}
        pairs.append((chunked.gated_rms_norm_chunked, reference.gated_rms_norm_reference, (x, gate, weight), options))
    for ours, theirs, leaves, options in pairs:
        a = values_and_gradients(lambda *t, f=ours, o=options: f(*t, **o), leaves)
        b = values_and_gradients(lambda *t, f=theirs, o=options: f(*t, **o), leaves)
        assert_same(a, b, tolerance)


def test_against_torch():
    x, gate, weight = inputs((9, 24))
    assert_same([rms_norm(x, weight, 1e-5)], [F.rms_norm(x, (24,), weight, 1e-5)], 1e-12)
    assert_same([l2_norm(x, 0.0)], [F.normalize(x, dim=-1)], 1e-12)
    assert_same([gated_rms_norm(x, gate, weight)], [F.rms_norm(x, (24,), weight, 1e-6) * F.silu(gate)], 1e-12)
    mamba2 = gated_rms_norm(x, gate, weight, norm_first=False)
    assert_same([mamba2], [F.rms_norm(x * F.silu(gate), (24,), weight, 1e-6)], 1e-12)


@pytest.mark.parametrize("activation, norm_first", GATES)
def test_gradcheck(activation, norm_first, block):
    def run(*t):
        return gated_rms_norm(*t, activation=activation, norm_first=norm_first)

    x, gate, weight = inputs((3, 4))
    assert torch.autograd.gradcheck(run, (x, gate, weight))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(l2_norm, (x,))


def test_zero_and_huge_rows_stay_finite():
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e15), torch.full((8,), 1e-20)]).requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    for y in (rms_norm(x, weight), l2_norm(x)):
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and dx.isfinite().all()
        assert torch.equal(y[0], torch.zeros(8))
    torch.testing.assert_close(l2_norm(x)[1].norm(), torch.tensor(1.0))


def test_bf16_rounds_once():
    """Statistics in fp32: the only error is the rounding of the result, at most half a unit in the last of 8 bits."""
    x, gate, weight = inputs((64, 48), torch.bfloat16)
    for norm_first in (True, False):
        y = gated_rms_norm(x, gate, weight, norm_first=norm_first)
        exact = reference.gated_rms_norm_reference(x.double(), gate.double(), weight.double(), norm_first=norm_first)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-8).all()
    ours = values_and_gradients(rms_norm, (x, weight))
    exact = values_and_gradients(
        reference.rms_norm_reference, [t.detach().double().requires_grad_() for t in (x, weight)]
    )
    for a, b in zip(ours, exact):
        assert (a.double() - b).norm() / b.norm() < 4e-3


def test_mixed_dtypes_strides_empty_and_autocast():
    x, _, weight = inputs((6, 8), torch.float32)
    assert rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16
    wide = torch.randn(6, 24)
    assert_same([rms_norm(wide[:, 8:16], weight)], [rms_norm(wide[:, 8:16].contiguous(), weight)], 0)
    assert rms_norm(torch.empty(0, 8), weight).shape == (0, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rms_norm(x, weight)
    assert cast.dtype == torch.float32 and torch.equal(cast, rms_norm(x, weight))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: rms_norm(torch.zeros(2, 3), torch.ones(4)), "weight"),
        (lambda: rms_norm(torch.zeros(2, 3, dtype=torch.int32), torch.ones(3)), "x must"),
        (lambda: l2_norm(torch.zeros(2, 3), eps=-1.0), "eps"),
        (lambda: gated_rms_norm(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(3)), "gate"),
        (lambda: gated_rms_norm(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), activation="relu"), "activation"),
    ],
)
def test_mistakes_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_triton_is_not_asked_for_rows_it_cannot_hold(monkeypatch):
    monkeypatch.setattr("kernels.norm.triton_objection", lambda request: None)

    def verdict(D):
        request = Request("rms_norm", torch.device("cpu"), torch.float32, {"rows": 1, "D": D})
        return dict(explain(RMS_NORM_FORMS, request))

    assert verdict(8192)["triton"] == "chosen"
    assert "8192" in verdict(8193)["triton"] and verdict(8193)["chunked"] == "chosen"


def added(function, leaves):
    """[normed, total, dx, d_residual, d_weight], with gradients of both results."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    results = function(*leaves, 1e-5)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in results]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


MIXED = [
    (torch.float64, torch.float64, 1e-10),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-5),
]


@pytest.mark.parametrize("left, right, tolerance", MIXED, ids=str)
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 8), (11, 1), (5,), (0, 4)])
def test_addition_and_norm_are_the_definition(shape, left, right, tolerance, block):
    x, stream, weight = inputs(shape)
    leaves = [x.to(left), stream.to(right), weight.to(torch.promote_types(left, right))]
    ours, theirs = (added(f, leaves) for f in (residual.add_rms_norm_chunked, reference.add_rms_norm_reference))
    assert [y.dtype for y in ours[:4]] == [torch.promote_types(left, right)] * 2 + [left, right]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        # Where both sides round a gradient to bf16 they may fall on neighbours.
        near = 2**-7 if a.dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(a, b, atol=near, rtol=near)


def test_addition_and_norm_are_the_two_by_themselves_bit_for_bit():
    x, stream, weight = inputs((33, 24), torch.float32)
    y, total = add_rms_norm(x, stream, weight)
    assert torch.equal(total, x + stream)
    assert torch.equal(y, rms_norm(x + stream, weight))


def test_gradcheck_of_the_addition_and_either_result_alone(block):
    x, stream, weight = inputs((3, 4))
    assert torch.autograd.gradcheck(add_rms_norm, (x, stream, weight))
    for used in (0, 1):
        ours = torch.autograd.grad(add_rms_norm(x, stream, weight)[used].sum(), (x, stream))
        total = x + stream
        wanted = torch.autograd.grad((rms_norm(total, weight), total)[used].sum(), (x, stream))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_addition_keeps_its_sum_only():
    x, stream, weight = inputs((9, 8), torch.float32)
    y, total = add_rms_norm(x, stream, weight)
    saved = [t.data_ptr() for t in y.grad_fn.saved_tensors]
    assert total.data_ptr() in saved and weight.data_ptr() in saved
    assert not {x.data_ptr(), stream.data_ptr()} & set(saved)


@pytest.mark.parametrize(
    "stream, message",
    [
        (torch.zeros(2, 5), "residual must be floating point"),
        (torch.zeros(2, 4, dtype=torch.int64), "residual must be"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(torch.zeros(2, 4), stream, torch.ones(4))
