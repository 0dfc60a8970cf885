"""The Triton short convolution against a loop in float64, under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.short_conv.triton import short_convolution_triton


def definition(x, weight, bias, activation, state, bounds):
    """y and final states by the definition, one sequence and one token at a time."""
    W = weight.shape[1]
    rows, finals = [], []
    for n, (row, start, end) in enumerate(bounds):
        before = state[n].t() if state is not None else x.new_zeros(W - 1, x.shape[2])
        inputs = torch.cat([before, x[row, start:end]])
        for t in range(end - start):
            z = (inputs[t : t + W] * weight.t()).sum(0) + (0 if bias is None else bias)
            rows.append(z * torch.sigmoid(z) if activation == "silu" else z)
        finals.append(inputs[inputs.shape[0] - (W - 1) :].t())
    return torch.stack(rows).reshape(x.shape), torch.stack(finals)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


CASES = [
    # B, T, D, W, bias, activation, state, cumulative lengths
    (2, 17, 24, 4, True, "silu", True, None),
    (1, 70, 5, 4, False, None, False, None),
    (2, 1, 8, 4, True, "silu", True, None),
    (1, 130, 4, 3, False, "silu", True, None),
    (1, 40, 8, 4, True, "silu", True, [0, 1, 1, 3, 38, 40]),
    (1, 40, 8, 2, False, "silu", False, [0, 0, 7, 40]),
    (1, 9, 8, 1, True, None, False, None),
]


@pytest.mark.parametrize(("B", "T", "D", "W", "has_bias", "activation", "has_state", "cumulative"), CASES)
def test_forward_and_gradients(B, T, D, W, has_bias, activation, has_state, cumulative):
    torch.manual_seed(0)
    bounds = [(b, 0, T) for b in range(B)]
    if cumulative is not None:
        bounds = [(0, start, end) for start, end in itertools.pairwise(cumulative)]
    inputs = [torch.randn(B, T, D), torch.randn(D, W)]
    inputs.append(torch.randn(D) if has_bias else None)
    inputs.append(torch.randn(len(bounds), D, W - 1) if has_state else None)
    dy, dfinal = torch.randn(B, T, D), torch.randn(len(bounds), D, W - 1)

    exact = [None if a is None else a.double().requires_grad_() for a in inputs]
    y, final = definition(exact[0], exact[1], exact[2], activation, exact[3], bounds)
    wanted = [a for a in exact if a is not None]
    expected = torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), wanted)

    ours = [None if a is None else a.clone().requires_grad_() for a in inputs]
    cu_seqlens = None if cumulative is None else torch.tensor(cumulative, dtype=torch.int32)
    y_ours, final_ours = short_convolution_triton(
        ours[0],
        ours[1],
        ours[2],
        activation=activation,
        initial_state=ours[3],
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    got = torch.autograd.grad((y_ours * dy).sum() + (final_ours * dfinal).sum(), [a for a in ours if a is not None])
    assert relative(y_ours, y) < 1e-6
    assert torch.equal(final_ours.double(), final)
    for name, a, b in zip(["x", "weight", "bias", "state"], got, expected):
        assert relative(a, b) < 1e-5, name


def test_strided_input_and_no_final_state():
    torch.manual_seed(1)
    wide = torch.randn(2, 20, 24)
    x = wide[:, :, 8:16]
    weight = torch.randn(8, 4)
    y, final = short_convolution_triton(x, weight)
    expected, _ = definition(x.double(), weight.double(), None, None, None, [(0, 0, 20), (1, 0, 20)])
    assert final is None
    assert relative(y, expected) < 1e-6


def test_refuses_what_it_cannot_do():
    x = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="weight must be"):
        short_convolution_triton(x, torch.randn(8, 9))
    with pytest.raises(ValueError, match="activation"):
        short_convolution_triton(x, torch.randn(8, 4), activation="gelu")
    with pytest.raises(ValueError, match="initial_state"):
        short_convolution_triton(x, torch.randn(8, 4), initial_state=torch.randn(1, 8, 4))
