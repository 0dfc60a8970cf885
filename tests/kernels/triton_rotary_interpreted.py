"""The Triton rotation against its definition in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels.rotary.reference import rotary_reference
from kernels.rotary.triton import rotary_triton


def relative(a, b):
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


def compare(x, cos, sin, positions, interleaved):
    exact, single = x.detach().double().requires_grad_(), x.detach().requires_grad_()
    wanted = rotary_reference(exact, cos.double(), sin.double(), positions, interleaved)
    got = rotary_triton(single, cos, sin, positions, interleaved)
    dy = torch.randn_like(wanted)
    assert got.is_contiguous()
    assert relative(got, wanted) < 1e-6
    (a,), (b,) = torch.autograd.grad(got, single, dy.float()), torch.autograd.grad(wanted, exact, dy)
    assert relative(a, b) < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape, half", [((2, 5, 3, 16), 8), ((1, 7, 2, 12), 3), ((3, 2, 1, 7), 2), ((1, 70, 5, 64), 32)]
)
def test_values_and_gradients(shape, half, interleaved):
    torch.manual_seed(0)
    B, T = shape[:2]
    x, angles = torch.randn(shape), torch.randn(B, T, 1, half) * 3
    compare(x, angles.cos(), angles.sin(), None, interleaved)
    compare(x, angles[:1].cos(), angles[:1].sin(), None, interleaved)  # one row for the batch
    table = torch.randn(11, half)
    compare(x, table.cos(), table.sin(), torch.randint(0, 11, (B, T)), interleaved)
    compare(x, table.cos(), table.sin(), torch.randint(0, 11, (1, T)), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_slices_and_no_tokens(interleaved):
    torch.manual_seed(0)
    mixed, angles = torch.randn(2, 5, 40), torch.randn(2, 5, 1, 3)
    compare(mixed[..., 4:28].unflatten(-1, (3, 8)), angles.cos(), angles.sin(), None, interleaved)
    empty = rotary_triton(torch.zeros(1, 0, 2, 4), torch.zeros(1, 0, 1, 2), torch.zeros(1, 0, 1, 2), None, interleaved)
    assert empty.shape == (1, 0, 2, 4)
