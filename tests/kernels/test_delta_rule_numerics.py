"""The delta rule where numbers get hard: erasing gates, bf16, fp16, correlated keys; and what the operator is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import delta_rule, gated_linear_attention
from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.context import summarize
from kernels.delta_rule.reference import delta_rule_reference
from tests.kernels.delta_rule_cases import GATES, assert_close, inputs, rms_error, run


def exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, in fp64."""
    return {name: x.detach().double().requires_grad_() for name, x in tensors.items()}


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("levels", [(-20.0,), (0.0, -1e-6, -20.0), (0.0, -0.01, -1e4), (-0.01, -float("inf")), (-5.0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_gates(dtype: torch.dtype, levels: tuple[float, ...], gate: str) -> None:
    tensors = inputs(150, gate, dtype=dtype)
    with torch.no_grad():
        g = tensors["g"]
        pick = torch.randint(len(levels), g.shape, generator=torch.Generator().manual_seed(2))
        g.copy_(torch.tensor(levels, dtype=dtype)[pick])
    found = run(delta_rule_chunked, tensors)
    assert_close(found, run(delta_rule_reference, exact(tensors)), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_memory_after_an_erasing_step_keeps_its_precision(gate: str) -> None:
    """A running sum of g would have lost it: after -1e4 an fp32 sum resolves 1e-3, and decays by as much were wrong."""
    tensors = inputs(60, gate, dtype=torch.float32)
    with torch.no_grad():
        tensors["g"].fill_(-1e-2)[:, 5] = -1e4
    found, wanted = run(delta_rule_chunked, tensors), run(delta_rule_reference, exact(tensors))
    assert rms_error(found["o"], wanted["o"]) < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_zero_and_tiny_keys_when_normalised(gate: str) -> None:
    tensors = inputs(40, gate)
    with torch.no_grad():
        for name in ("q", "k"):
            tensors[name][:, 3] = 0
            tensors[name][:, 4] *= 1e-4
    found = run(delta_rule_chunked, tensors, normalize_qk=True)
    assert_close(found, run(delta_rule_reference, tensors, normalize_qk=True), 1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("gate", GATES)
def test_equal_keys_and_the_ends_of_beta(gate: str, beta: float) -> None:
    """beta = 2 and one key throughout: powers of the chunk's matrix reach 1e18 before they cancel."""
    tensors = inputs(70, gate, dtype=torch.float32)
    with torch.no_grad():
        tensors["beta"].fill_(beta)
        tensors["k"].copy_(tensors["k"][:1, :1].expand_as(tensors["k"]).clone())
    assert_close(run(delta_rule_chunked, tensors), run(delta_rule_reference, exact(tensors)), 1e-5)


def correlated(tensors: dict[str, Tensor], cosine: float) -> None:
    """Moves the keys until two of them have this cosine on average, as keys after SiLU have."""
    with torch.no_grad():
        k = tensors["k"].float()
        common = torch.nn.functional.normalize(torch.ones(k.shape[-1]), dim=0)
        k = torch.nn.functional.normalize(k * (1 - cosine) ** 0.5 + common * cosine**0.5, dim=-1)
        tensors["k"].copy_(k)


# Rounding the operands of every product to bf16 alone costs o and the state .0043 (beta below 1) and .0059 (below 2) for
# random keys without a gate, and .024 for keys of cosine .9; here the results of products are rounded as well. Gradients
# of beta and g are differences of larger sums.
FAINT = {"": 0.008, "o": 0.006, "state": 0.006, "dbeta": 0.02, "dg": 0.02}
STRONG = {"": 0.012, "o": 0.008, "state": 0.008, "dbeta": 0.02, "dg": 0.02}
CORRELATED = {"": 0.03, "o": 0.024, "state": 0.024, "dbeta": 0.05, "dg": 0.05}


@pytest.mark.parametrize(
    ("cosine", "beta", "tolerance"), [(0.0, 1.0, FAINT), (0.0, 2.0, STRONG), (0.9, 2.0, CORRELATED)]
)
@pytest.mark.parametrize("gate", GATES)
def test_bf16(gate: str, cosine: float, beta: float, tolerance: dict[str, float]) -> None:
    tensors = inputs(256, gate, B=1, H=2, HV=2, K=64, V=64, dtype=torch.bfloat16)
    correlated(tensors, cosine)
    with torch.no_grad():
        tensors["beta"].mul_(beta / 2)
    # States are fp32 in a model, also where tokens are bf16.
    tensors["initial_state"] = tensors["initial_state"].detach().float().requires_grad_()
    found = run(delta_rule_chunked, tensors, scale=0.125)
    assert_close(found, run(delta_rule_reference, exact(tensors), scale=0.125), tolerance)


def test_dtypes_of_results() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensors = inputs(20, "head", dtype=dtype)
        o, state = delta_rule(
            *(tensors[x] for x in ("q", "k", "v", "beta", "g")),
            initial_state=tensors["initial_state"],
            output_final_state=True,
        )
        assert o.dtype == dtype
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (o.sum() + state.sum()).backward()
        assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in tensors.values())
        if dtype == torch.float16:
            named = exact(tensors)
            wanted = delta_rule_reference(
                *(named[x] for x in ("q", "k", "v", "beta", "g")),
                scale=8**-0.5,
                initial_state=named["initial_state"],
                output_final_state=True,
                cu_seqlens=None,
                normalize_qk=False,
            )
            assert rms_error(o, wanted[0]) < 1e-3


def test_a_channel_gate_with_equal_channels_is_a_head_gate() -> None:
    tensors = inputs(100, "head")
    by_head = run(delta_rule, tensors)
    spread = run(
        lambda q, k, v, beta, g, **x: delta_rule(q, k, v, beta, g[..., None].expand(-1, -1, -1, 8), **x), tensors
    )
    assert_close(spread, by_head, 1e-12)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_an_open_gate_is_no_gate(gate: str) -> None:
    tensors = inputs(100, gate)
    with torch.no_grad():
        tensors["g"].zero_()
    gated = run(delta_rule, tensors)
    del gated["dg"], tensors["g"]
    assert_close(gated, run(delta_rule, tensors), 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_faint_writes_of_large_values_are_additive_memory(gate: str) -> None:
    """As beta falls and v grows as 1 / beta, the correction falls away and linear attention is left."""
    tensors = inputs(100, gate, H=4, HV=4)
    q, k, v = (tensors[name].detach() for name in ("q", "k", "v"))
    g = tensors["g"].detach() if gate != "none" else None
    beta = torch.full(v.shape[:3], 1e-9, dtype=v.dtype)
    o, _ = delta_rule(q, k, v / 1e-9, beta, g)
    assert rms_error(o, gated_linear_attention(q, k, v, g)[0]) < 1e-7


@pytest.mark.parametrize("gate", GATES)
def test_the_transition_never_stretches_the_state(gate: str) -> None:
    """||I - beta k k^T|| <= 1 for unit keys and 0 <= beta <= 2; beyond 2 it grows."""
    tensors = inputs(100, gate)
    _, transition = summarize(*(tensors[name].detach() for name in ("k", "v", "beta")), tensors.get("g"))
    assert torch.linalg.matrix_norm(transition, 2).max() <= 1 + 1e-12
    k = torch.tensor([0.6, 0.8], dtype=torch.float64).expand(1, 10, 1, 2)
    beta = torch.full((1, 10, 1), 2.5, dtype=torch.float64)
    _, transition = summarize(k, torch.zeros_like(k), beta)
    torch.testing.assert_close(torch.linalg.matrix_norm(transition, 2).item(), 1.5**10)


@pytest.mark.parametrize("decay", [None, 0.97])
def test_rebinding_separates_the_delta_rule_from_additive_memory(decay: float | None) -> None:
    """Every key gets a new value once; asked for the latest, additive memory wavers between the two.

    64 trials of 8 random unit keys in 32 dims; the answer is the stored value nearest to the output. Deterministic.
    """
    trials, n, K, V = 64, 8, 32, 32
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(trials, n, K, generator=generator), dim=-1)
    values = torch.nn.functional.normalize(torch.randn(trials, 2 * n, V, generator=generator), dim=-1)
    k = torch.cat([keys, keys, torch.zeros_like(keys)], 1)[:, :, None]
    q = torch.cat([torch.zeros_like(k[:, : 2 * n]), keys[:, :, None]], 1)
    v = torch.cat([values, torch.zeros(trials, n, V)], 1)[:, :, None]
    beta = (torch.arange(3 * n) < 2 * n).float()[None, :, None].expand(trials, -1, 1)
    # The gate acts while writing, not while asking.
    g = None if decay is None else beta * torch.tensor(decay).log()

    def accuracy(o: Tensor) -> float:
        nearest = torch.einsum("bnv,bmv->bnm", o[:, 2 * n :, 0], values).argmax(-1)
        return (nearest == torch.arange(n, 2 * n)).float().mean().item()

    assert accuracy(delta_rule(q, k, v, beta, g)[0]) > 0.98
    if decay is None:
        assert accuracy(gated_linear_attention(q, k, v, g)[0]) < 0.6
