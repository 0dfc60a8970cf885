"""The Triton SwiGLU against its formula in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.swiglu import triton as form
from kernels.swiglu.triton import swiglu_triton


def relative(a, b):
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


def formula(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("tile", [None, {"ELEMENTS": 16, "WIDTH": 8}], ids=["usual tile", "many tiles"])
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 7, 32), (1, 2), (3, 2600), (300, 6)])
def test_values_and_gradients(shape, tile, monkeypatch):
    if tile:
        if shape[-1] > 1000:
            return
        for kernel in ("swiglu_forward", "swiglu_backward"):
            monkeypatch.setitem(form.DEFAULTS[kernel], "generic", {**form.DEFAULTS[kernel]["generic"], **tile})
        from kernels import tuning

        tuning.forget()
    torch.manual_seed(0)
    x = torch.randn(shape)
    exact, single = x.double().requires_grad_(), x.clone().requires_grad_()
    wanted, got = formula(exact), swiglu_triton(single)
    dy = torch.randn_like(wanted)
    assert relative(got, wanted) < 1e-6
    (a,), (b,) = torch.autograd.grad(got, single, dy.float()), torch.autograd.grad(wanted, exact, dy)
    assert relative(a, b) < 1e-6


def test_slices_and_no_rows():
    torch.manual_seed(0)
    wide = torch.randn(6, 48)
    assert relative(swiglu_triton(wide[:, 8:40]), formula(wide[:, 8:40].double())) < 1e-6
    x = torch.randn(0, 8, requires_grad=True)
    swiglu_triton(x).sum().backward()
    assert x.grad.shape == (0, 8)
