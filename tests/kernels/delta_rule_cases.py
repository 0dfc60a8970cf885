"""Inputs and comparisons that the tests of the delta rule share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GATES = ("none", "head", "channel")


def inputs(
    T: int,
    gate: str,
    *,
    B: int = 2,
    H: int = 2,
    HV: int = 4,
    K: int = 8,
    V: int = 6,
    N: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v, beta in (0, 2), g mostly between -2 and 0, initial_state; leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    made = {
        "q": unit(normal(B, T, H, K), dim=-1),
        "k": unit(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, HV, V),
        "beta": 2 * uniform(B, T, HV),
        "initial_state": normal(B if N is None else N, HV, K, V),
    }
    if gate != "none":
        made["g"] = -2 * uniform(B, T, HV, *((K,) if gate == "channel" else ())).square()
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def run(form: Callable[..., Any], tensors: dict[str, Tensor], seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """o, the final state, and the gradients of all inputs under random gradients of both, widened to fp64."""
    defaults = {
        "g": None,
        "scale": 0.7,
        "initial_state": None,
        "output_final_state": True,
        "cu_seqlens": None,
        "normalize_qk": False,
    }
    arguments = {**defaults, **tensors, **options}
    q, k, v, beta, g = (arguments.pop(name) for name in ("q", "k", "v", "beta", "g"))
    o, state = form(q, k, v, beta, g, **arguments)
    generator = torch.Generator().manual_seed(seed)
    do, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state))
    grads = torch.autograd.grad([o, state], list(tensors.values()), [do, dstate])
    found = {"o": o, "state": state, **{f"d{name}": x for name, x in zip(tensors, grads)}}
    return {name: x.detach().double() for name, x in found.items()}


def rms_error(actual: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of what is wanted; the denominator never below 1e-6."""
    actual, wanted = actual.detach(), wanted.detach()
    difference = (actual.double() - wanted.double()).square().mean().sqrt()
    return float(difference / wanted.double().square().mean().sqrt().clamp_min(1e-6))


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float | dict[str, float]) -> None:
    """Each tensor within its relative RMS tolerance (key "" for those not named), without NaN."""
    assert actual.keys() == wanted.keys()
    for name, x in actual.items():
        limit = tolerance if isinstance(tolerance, float) else tolerance.get(name, tolerance[""])
        assert x.isfinite().all(), f"{name} is not finite"
        assert rms_error(x, wanted[name]) <= limit, f"{name}: {rms_error(x, wanted[name]):.2e} > {limit}"
