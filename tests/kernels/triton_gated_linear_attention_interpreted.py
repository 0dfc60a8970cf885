"""Triton gated linear attention against its recurrence in float64, under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.gated_linear_attention.triton import gated_linear_attention_triton
from kernels.tuning import override


def recurrence(q, k, v, g, scale, state, bounds):
    """o and final states, one sequence and one token at a time."""
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2) * scale, k.repeat_interleave(group, 2)
    rows, finals = [], []
    for n, (row, start, end) in enumerate(bounds):
        S = torch.zeros(v.shape[2], q.shape[3], v.shape[3], dtype=q.dtype) if state is None else state[n]
        for t in range(start, end):
            if g is not None:
                S = S * (g[row, t].exp()[:, None, None] if g.dim() == 3 else g[row, t].exp()[:, :, None])
            S = S + k[row, t][:, :, None] * v[row, t][:, None, :]
            rows.append((S * q[row, t][:, :, None]).sum(1))
        finals.append(S)
    return torch.stack(rows).reshape(v.shape), torch.stack(finals)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()


def compare(B, T, H, HV, K, V, gate, has_state=True, cumulative=None, strength=1.0, scale=None, edit=None):
    torch.manual_seed(0)
    bounds = [(b, 0, T) for b in range(B)]
    if cumulative is not None:
        bounds = [(0, start, end) for start, end in itertools.pairwise(cumulative)]
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, HV, V)
    shape = {"none": None, "scalar": (B, T, HV), "channel": (B, T, HV, K)}[gate]
    g = None if shape is None else torch.nn.functional.logsigmoid(torch.randn(shape) + 1) * strength
    if edit is not None:
        edit(g)
    state = torch.randn(len(bounds), HV, K, V) if has_state else None
    do, dfinal = torch.randn(B, T, HV, V), torch.randn(len(bounds), HV, K, V)
    inputs = {"q": q, "k": k, "v": v, "g": g, "state": state}
    inputs = {name: x for name, x in inputs.items() if x is not None}

    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    o, final = recurrence(
        exact["q"],
        exact["k"],
        exact["v"],
        exact.get("g"),
        K**-0.5 if scale is None else scale,
        exact.get("state"),
        bounds,
    )
    expected = torch.autograd.grad((o * do).sum() + (final * dfinal).sum(), list(exact.values()))

    ours = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o_ours, final_ours = gated_linear_attention_triton(
        ours["q"], ours["k"], ours["v"], ours.get("g"), scale=scale, initial_state=ours.get("state"),
        output_final_state=True, cu_seqlens=None if cumulative is None else torch.tensor(cumulative, dtype=torch.int32),
    )  # fmt: skip
    got = torch.autograd.grad((o_ours * do).sum() + (final_ours * dfinal).sum(), list(ours.values()))
    errors = {"o": relative(o_ours, o), "final": relative(final_ours, final)}
    errors.update({"d" + name: relative(a, b) for name, a, b in zip(inputs, got, expected)})
    assert final_ours.dtype == torch.float32
    assert all(error < 1e-5 for error in errors.values()), errors


GATES = ["none", "scalar", "channel"]
# What is long: with every gate in a campaign, without the simplest one in every run.
LONG_WITHOUT = [pytest.param("none", marks=pytest.mark.campaign), "scalar", "channel"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("T", "K", "V"), [(1, 16, 32), (15, 32, 16), (17, 16, 16), (64, 32, 64), (65, 64, 32), (200, 16, 16)]
)
def test_lengths_and_widths(T, K, V, gate):
    compare(1, T, 1, 1, K, V, gate)


@pytest.mark.parametrize("gate", GATES)
def test_widths_that_fill_no_tile(gate):
    compare(1, 65, 1, 1, 100, 20, gate)
    compare(1, 20, 1, 1, 24, 100, gate)


@pytest.mark.parametrize("gate", LONG_WITHOUT)
def test_several_tiles(gate):
    compare(1, 70, 1, 1, 128, 128, gate, has_state=False)


@pytest.mark.parametrize("gate", GATES)
def test_grouped_value_heads_and_batch(gate):
    compare(2, 33, 2, 4, 16, 16, gate, scale=0.5)


@pytest.mark.parametrize("gate", LONG_WITHOUT)
def test_packed_sequences_of_length_zero_one_and_ragged(gate):
    compare(1, 140, 1, 2, 16, 16, gate, cumulative=[0, 1, 1, 66, 70, 140, 140])


@pytest.mark.parametrize("gate", LONG_WITHOUT)
def test_sequences_cut_into_segments(gate):
    with override({"gla_scan": {"SEGMENTS": 3}}):
        compare(1, 260, 1, 1, 16, 32, gate)
        compare(1, 140, 1, 1, 16, 16, gate, has_state=False, cumulative=[0, 1, 1, 130, 140])


@pytest.mark.parametrize("gate", GATES[1:])
def test_extreme_gates(gate):
    def edit(g):
        g[:, ::7] = -50.0
        g[:, ::5] = 0.0
        g[:, ::11] = -1e-6

    compare(1, 80, 1, 1, 16, 16, gate, strength=3.0, edit=edit)


@pytest.mark.parametrize("gate", GATES[1:])
def test_a_gate_of_minus_infinity_forgets_everything(gate):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 1, 16) for _ in range(3))
    g = -torch.rand((1, 40, 1) if gate == "scalar" else (1, 40, 1, 16))
    g[:, 20] = float("-inf")
    o, final = gated_linear_attention_triton(q, k, v, g, output_final_state=True)
    after, final_after = gated_linear_attention_triton(
        q[:, 20:], k[:, 20:], v[:, 20:], g[:, 20:], output_final_state=True
    )
    assert torch.isfinite(o).all()
    assert relative(o[:, 20:], after.double()) < 1e-5
    assert relative(final, final_after.double()) < 1e-5


def test_no_final_state_wanted():
    q, k, v = (torch.randn(1, 5, 1, 16) for _ in range(3))
    assert gated_linear_attention_triton(q, k, v, None)[1] is None


def test_refuses_what_it_cannot_do():
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="multiple of H"):
        gated_linear_attention_triton(q, q, torch.randn(1, 4, 3, 16))
    with pytest.raises(ValueError, match="g must be"):
        gated_linear_attention_triton(q, q, q, torch.randn(1, 4, 1))
    with pytest.raises(ValueError, match="initial_state"):
        gated_linear_attention_triton(q, q, q, initial_state=torch.randn(2, 2, 16, 16))
