"""The workloads that only read and write memory: norms after an addition, rotary positions, SwiGLU, the rational activation.
A shape's width is H x D.

Below each, what plain torch offers in its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benching.shapes import Inputs, Shape, Workload, finish, generator_of, normal


def _addition(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = generator_of(device)
    sizes = (shape.B, shape.T, shape.H * shape.K)
    x, residual = (normal(sizes, device, generator).to(dtype) for _ in range(2))
    return finish({"x": x, "residual": residual, "weight": torch.ones(sizes[-1], device=device)})


def _call_addition(inputs: Inputs) -> Tensor:
    from kernels.norm import add_rms_norm

    normed, total = add_rms_norm(inputs["x"], inputs["residual"], inputs["weight"], 1e-6)
    return torch.cat((normed, total), dim=-1)


def added(i: Inputs) -> Tensor:
    total = i["x"] + i["residual"]
    normed = F.rms_norm(total, total.shape[-1:], i["weight"].to(total.dtype), 1e-6)
    return torch.cat((normed, total), dim=-1)


def _heads(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries as they lie in a projection of queries, keys and values."""
    generator = generator_of(device)
    width = shape.H * shape.K
    mixed = normal((shape.B, shape.T, 3 * width), device, generator).to(dtype)
    exponents = torch.arange(0, shape.K, 2, device=device) / shape.K
    angles = torch.arange(shape.T, device=device)[:, None] * 10000.0**-exponents
    angles = angles.expand(shape.B, -1, -1)[:, :, None]
    made = finish({"x": mixed[..., :width].unflatten(-1, (shape.H, shape.K))})
    return made | {"cos": angles.cos(), "sin": angles.sin()}


def _pairs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _heads(shape, dtype, device) | {"interleaved": True}


def _call_rotary(inputs: Inputs) -> Tensor:
    from kernels.rotary import rotary

    # The angles are constants, in fp32 unless everything is wider.
    wide = torch.promote_types(inputs["x"].dtype, torch.float32)
    return rotary(**{name: v.to(wide) if name in ("cos", "sin") else v for name, v in inputs.items()})


def rotate_half(i: Inputs) -> Tensor:
    """As most models write it: x cos + rotate_half(x) sin."""
    x = i["x"]
    cos, sin = (torch.cat((t, t), dim=-1) for t in (i["cos"], i["sin"]))
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def complex_product(i: Inputs) -> Tensor:
    """As Llama's own release writes it."""
    x = i["x"]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(i["cos"], i["sin"])).flatten(3).to(x.dtype)


def _projection(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A hidden layer of 8/3 of the width, rounded up to 64."""
    hidden = -(-shape.H * shape.K * 8 // (3 * 64)) * 64
    generator = generator_of(device)
    return finish({"gate_up": normal((shape.B, shape.T, 2 * hidden), device, generator).to(dtype)})


def _call_swiglu(inputs: Inputs) -> Tensor:
    from kernels.swiglu import swiglu

    return swiglu(**inputs)


def gated(i: Inputs) -> Tensor:
    gate, up = i["gate_up"].chunk(2, dim=-1)
    return F.silu(gate) * up


def _hidden(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """KAT's hidden layer, four times the width, with coefficients close to its fit of SiLU: one numerator, 8 denominators."""
    generator = generator_of(device)
    x = normal((shape.B, shape.T, 4 * shape.H * shape.K), device, generator).to(dtype)
    above = torch.tensor([[6.9e-5, 0.5, 0.25, 0.0522, 5.4e-3, 2.3e-4]], device=device)
    below = torch.tensor([[0.0, 0.104, 0.0, 4.5e-4]], device=device)
    below = below * (1 + normal((8, 4), device, generator) / 8)
    return finish({"x": x, "numerator": above, "denominator": below})


def _call_rational(inputs: Inputs) -> Tensor:
    from kernels.rational import rational

    return rational(**inputs)


def fraction(i: Inputs) -> Tensor:
    """Both polynomials by Horner's rule, in fp32 as ours."""
    a, b = i["numerator"][..., None], i["denominator"][..., None]
    h = i["x"].to(a.dtype).unflatten(-1, (b.shape[0], -1))
    above, below = a[:, -1], b[:, -1]
    for k in reversed(range(a.shape[1] - 1)):
        above = above * h + a[:, k]
    for k in reversed(range(b.shape[1] - 1)):
        below = below * h + b[:, k]
    return (above / (1 + (below * h).abs())).flatten(-2).to(i["x"].dtype)


WORKLOADS = (
    Workload("add_rms_norm", "norm", _addition, _call_addition),
    Workload("rotary", "rotary", _heads, _call_rotary),
    Workload("rotary_interleaved", "rotary", _pairs, _call_rotary),
    Workload("swiglu", "swiglu", _projection, _call_swiglu),
    Workload("rational", "rational", _hidden, _call_rational),
)
