"""The Triton norms against their formulas in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.norm.triton import add_rms_norm_triton, gated_rms_norm_triton, l2_norm_triton, rms_norm_triton

EPS = 1e-3  # large enough to be seen in the values


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def gated(x: Tensor, gate: Tensor, weight: Tensor, activation: str, norm_first: bool) -> Tensor:
    a = torch.sigmoid(gate) * (gate if activation == "silu" else 1)
    return rms(x) * weight * a if norm_first else rms(x * a) * weight


def compare(ours, formula, inputs: list[Tensor]) -> None:
    exact = [a.double().requires_grad_() for a in inputs]
    single = [a.clone().requires_grad_() for a in inputs]
    expected, got = formula(*exact), ours(*single)
    dy = torch.randn_like(expected)
    assert relative(got, expected) < 1e-6
    wanted = torch.autograd.grad(expected, exact, dy)
    for i, (a, b) in enumerate(zip(torch.autograd.grad(got, single, dy.float()), wanted)):
        assert relative(a, b) < 1e-5, i


SHAPES = [(5, 100), (2, 3, 7, 64), (1, 3), (3, 5000), (700, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(shape[-1])]
    compare(lambda x, w: rms_norm_triton(x, w, EPS), lambda x, w: rms(x) * w, inputs)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_l2_norm(shape):
    torch.manual_seed(0)
    compare(
        lambda x: l2_norm_triton(x, EPS),
        lambda x: x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt(),
        [torch.randn(shape) * 0.1],
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(activation, norm_first):
    torch.manual_seed(0)
    for shape in SHAPES[:2]:
        compare(
            lambda x, z, w: gated_rms_norm_triton(x, z, w, EPS, activation=activation, norm_first=norm_first),
            lambda x, z, w: gated(x, z, w, activation, norm_first),
            [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])],
        )


def test_slices_of_a_projection_are_read_in_place():
    torch.manual_seed(0)
    wide = torch.randn(6, 48)
    x, gate, weight = wide[:, :16], wide[:, 32:], torch.randn(16)
    got = gated_rms_norm_triton(x, gate, weight, EPS)
    assert relative(got, gated(x.double(), gate.double(), weight.double(), "silu", True)) < 1e-6


def test_no_rows_and_no_weight():
    x = torch.randn(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    rms_norm_triton(x, weight, EPS).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    x = torch.randn(4, 8)
    assert relative(rms_norm_triton(x, None, EPS), rms(x.double())) < 1e-6


def test_refuses_what_it_cannot_do():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="activation"):
        gated_rms_norm_triton(x, x, torch.ones(8), EPS, activation="relu")
    with pytest.raises(ValueError, match="gate must have"):
        gated_rms_norm_triton(x, x[:1], torch.ones(8), EPS)
    with pytest.raises(ValueError, match="8192"):
        l2_norm_triton(torch.randn(1, 8193), EPS)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_addition_and_norm(shape, dtypes):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).to(dtype) for dtype in dtypes)
    single = [x.requires_grad_(), residual.requires_grad_(), torch.randn(shape[-1], requires_grad=True)]
    exact = [t.detach().double().requires_grad_() for t in single]
    total = exact[0] + exact[1]
    wanted, got = (rms(total) * exact[2], total), add_rms_norm_triton(*single, EPS)
    upstream = [torch.randn_like(t) for t in wanted]
    gradients = torch.autograd.grad(wanted, exact, upstream)
    ours = torch.autograd.grad(got, single, [u.float() for u in upstream], retain_graph=True)
    for i, (a, b) in enumerate(zip((*got, *ours), (*wanted, *gradients))):
        assert relative(a, b) < (1e-5 if a.dtype == torch.float32 else 1e-3), i
    assert [g.dtype for g in ours] == [*dtypes, torch.float32]
    for used in (0, 1):
        a = torch.autograd.grad(got[used], single[:2], upstream[used].float(), retain_graph=True)
        b = torch.autograd.grad(
            (rms(exact[0] + exact[1]) * exact[2], exact[0] + exact[1])[used], exact[:2], upstream[used]
        )
        assert all(relative(i, j) < 1e-3 for i, j in zip(a, b))


def test_addition_and_norm_of_slices():
    torch.manual_seed(0)
    wide, weight = torch.randn(6, 48), torch.randn(16)
    got, total = add_rms_norm_triton(wide[:, :16], wide[:, 20:36], weight, EPS)
    assert torch.equal(total, wide[:, :16] + wide[:, 20:36])
    assert relative(got, rms(total.double()) * weight) < 1e-6
