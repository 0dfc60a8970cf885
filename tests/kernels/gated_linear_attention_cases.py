"""Inputs, and one call with every gradient, for the tests of gated linear attention."""

from __future__ import annotations

import torch

GATES = ("none", "head", "channel")


def make(B, T, H, K, V, *, groups=1, gate="head", N=None, dtype=torch.float64, seed=0, strength=1.0):
    """q, k, v, g, initial_state. Log decays between -strength and 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    HV = H * groups
    shape = {"none": None, "head": (B, T, HV), "channel": (B, T, HV, K)}[gate]
    g = None
    if shape is not None:
        wide = torch.promote_types(dtype, torch.float32)
        g = (-strength * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(wide)
    q, k, v = (draw(B, T, H, K).to(dtype), draw(B, T, H, K).to(dtype), draw(B, T, HV, V).to(dtype))
    return q, k, v, g, draw(N or B, HV, K, V).to(torch.promote_types(dtype, torch.float32))


def run(form, inputs, *, state=True, cu_seqlens=None, **options):
    """[o, final state, dq, dk, dv, dg, dinitial]; the gradients of absent inputs are left out."""
    q, k, v, g, initial = (None if t is None else t.detach().clone().requires_grad_() for t in inputs)
    initial = initial if state else None
    o, final = form(q, k, v, g, initial_state=initial, output_final_state=True, cu_seqlens=cu_seqlens, **options)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    leaves = [t for t in (q, k, v, g, initial) if t is not None]
    return [o, final, *torch.autograd.grad((o * do).sum() + (final * dfinal).sum(), leaves)]


def relative_errors(ours, theirs):
    """RMS of the difference over RMS of the truth, tensor by tensor."""
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert bool(a.isfinite().all())
        difference = (a.detach().double() - b.detach().double()).norm()
        errors.append(float(difference / b.detach().double().norm().clamp(min=1e-30)))
    return errors
