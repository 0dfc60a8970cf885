"""The short convolution: fast form against the definition, packed batches, continuation, decoding."""

import itertools

import pytest
import torch

from kernels.dispatch import Request, explain
from kernels.short_conv import FORMS, short_convolution, short_convolution_step
from kernels.short_conv.chunked import short_convolution_chunked
from kernels.short_conv.reference import short_convolution_reference


def make(B, T, D, W, *, N=None, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(B, T, D), draw(D, W), draw(D) if bias else None, draw(N or B, D, W - 1)


def grads(form, inputs, *, state=True, cu_seqlens=None, activation="silu"):
    """Outputs and the gradient of every input, with a gradient into y and into the final state."""
    x, weight, bias, initial = inputs
    y, final = form(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial if state else None,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    leaves = [t for t in (x, weight, bias, initial if state else None) if t is not None]
    return [y, final, *torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), leaves, allow_unused=True)]


def assert_same(ours, theirs, tolerance):
    for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        if a is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, i
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, i=i: f"tensor {i}: {m}")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 17, 130])
@pytest.mark.parametrize("state, bias, activation", [(True, True, "silu"), (False, False, None), (True, True, None)])
def test_chunked_is_the_definition(T, dtype, tolerance, state, bias, activation):
    inputs = make(2, T, 5, 4, bias=bias, dtype=dtype)
    ours = grads(short_convolution_chunked, inputs, state=state, activation=activation)
    assert_same(ours, grads(short_convolution_reference, inputs, state=state, activation=activation), tolerance)


@pytest.mark.parametrize("W", [1, 2, 3])
def test_other_widths(W):
    inputs = make(2, 9, 3, W)
    assert_same(grads(short_convolution_chunked, inputs), grads(short_convolution_reference, inputs), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [[5, 1, 2, 70, 3], [0, 4, 0, 1, 9, 0], [1, 1, 1], [8, 1]])
@pytest.mark.parametrize("state", [True, False])
def test_packed_is_each_sequence_alone(lengths, state, dtype, tolerance):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = make(1, sum(lengths), 6, 4, N=len(lengths), dtype=dtype)
    ours = grads(short_convolution_chunked, inputs, state=state, cu_seqlens=cu_seqlens)

    x, weight, bias, initial = inputs
    parts = [
        short_convolution_reference(
            x[:, a:b],
            weight,
            bias,
            activation="silu",
            initial_state=initial[n : n + 1] if state else None,
            output_final_state=True,
        )
        for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
    ]

    def looped(*_, **__):
        return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])

    assert_same(ours, grads(looped, inputs, state=state), tolerance)
    reference = grads(short_convolution_reference, inputs, state=state, cu_seqlens=cu_seqlens)
    assert_same(ours, reference, tolerance)


def test_gradcheck():
    x, weight, bias, initial = make(1, 5, 2, 3, N=2)
    cu_seqlens = torch.tensor([0, 1, 5], dtype=torch.int32)

    def run(*tensors):
        x, weight, bias, initial = tensors
        return short_convolution_chunked(
            x, weight, bias, activation="silu", initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens
        )

    assert torch.autograd.gradcheck(run, (x, weight, bias, initial))


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_two_halves_and_decoding_equal_one_shot(cut):
    x, weight, bias, _ = make(2, 12, 4, 4)
    whole, last = short_convolution(x, weight, bias, activation="silu", output_final_state=True)
    first, state = short_convolution(x[:, :cut], weight, bias, activation="silu", output_final_state=True)
    second, final = short_convolution(
        x[:, cut:], weight, bias, activation="silu", initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(final, last, atol=0, rtol=0)
    for t in range(cut, 12):
        y, state = short_convolution_step(x[:, t], state, weight, bias, "silu")
        torch.testing.assert_close(y, whole[:, t], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=0, rtol=0)


def test_bf16_rounds_like_bf16():
    inputs = make(2, 70, 16, 4, dtype=torch.bfloat16)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    for a, b in zip(grads(short_convolution_chunked, inputs), grads(short_convolution_reference, exact)):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 5e-3


def test_mixed_dtypes_and_strided_input():
    wide = torch.randn(2, 20, 12)
    weight = torch.randn(4, 4)
    y, _ = short_convolution(wide[..., 4:8], weight)
    torch.testing.assert_close(
        y, short_convolution_reference(wide[..., 4:8].contiguous(), weight)[0], atol=1e-5, rtol=1e-5
    )
    y, _ = short_convolution(wide[..., 4:8].bfloat16(), weight)
    assert y.dtype == torch.bfloat16


def test_autocast_changes_nothing():
    x, weight, bias, _ = make(1, 9, 4, 4, dtype=torch.float32)
    plain, _ = short_convolution(x, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = short_convolution(x, weight, bias)
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_empty_batch_keeps_the_state():
    state = torch.randn(2, 3, 3)
    y, final = short_convolution(torch.empty(2, 0, 3), torch.randn(3, 4), initial_state=state, output_final_state=True)
    assert y.shape == (2, 0, 3) and torch.equal(final, state)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"x": torch.zeros(2, 3)}, "x must"),
        ({"weight": torch.zeros(5, 4)}, "weight"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"activation": "relu"}, "activation"),
        ({"initial_state": torch.zeros(2, 4, 4)}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens"),
        ({"x": torch.zeros(1, 8, 4), "cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens"),
        ({"x": torch.zeros(1, 8, 4), "cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens"),
    ],
)
def test_mistakes_are_named(change, word):
    arguments = {"x": torch.zeros(2, 8, 4), "weight": torch.zeros(4, 4)} | change
    with pytest.raises(ValueError, match=word):
        short_convolution(**arguments)


def test_triton_is_not_asked_for_taps_it_cannot_unroll(monkeypatch):
    monkeypatch.setattr("kernels.short_conv.triton_objection", lambda request: None)

    def verdict(W):
        return dict(explain(FORMS, Request("short_convolution", torch.device("cpu"), torch.float32, {"W": W})))

    assert verdict(8)["triton"] == "chosen"
    assert "8 taps" in verdict(9)["triton"] and verdict(9)["chunked"] == "chosen"
