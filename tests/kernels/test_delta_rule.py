"""The chunked delta rule against its definition: values, every gradient, packing, chaining, decoding."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch import Tensor

from kernels import delta_rule
from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.chunked_gates import Pairs, gates
from kernels.delta_rule.decode import delta_rule_step
from kernels.delta_rule.layout import chunk_layout
from kernels.delta_rule.reference import delta_rule_reference
from tests.kernels.delta_rule_cases import GATES, assert_close, inputs, run

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)


@functools.cache
def wanted(T: int, gate: str) -> dict[str, Tensor]:
    """The definition in fp64, once a case. normalize_qk is on: the keys are unit ones, so little changes but the path."""
    return run(delta_rule_reference, inputs(T, gate), normalize_qk=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_fp64_equals_the_definition(T: int, gate: str) -> None:
    for C in (16, 32, 64):
        found = run(delta_rule_chunked, inputs(T, gate), normalize_qk=True, chunk_size=C)
        assert_close(found, wanted(T, gate), 1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_fp32_equals_the_definition(T: int, gate: str) -> None:
    found = run(delta_rule_chunked, inputs(T, gate, dtype=torch.float32), normalize_qk=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs(T, gate, dtype=torch.float32).items()}
    assert_close(found, run(delta_rule_reference, exact, normalize_qk=True), 1e-5)


def test_the_definition_by_hand() -> None:
    """Two tokens, K = 2, V = 1: numbers worked out on paper, so that both forms cannot share an error."""
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2)
    v = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    beta = torch.tensor([1.0, 0.5]).view(1, 2, 1)
    g = torch.tensor([0.0, 0.5]).log().view(1, 2, 1)
    # Step 1 erases (decay 0) and writes 2 at [1, 0]. Step 2 halves it to [1, 0]; its key reads 0.6, the error is 0.4,
    # and 0.5 * 0.4 * [0.6, 0.8] is added: [1.12, 0.16].
    state = torch.tensor([[5.0], [7.0]]).view(1, 1, 2, 1)
    for form in (delta_rule_reference, delta_rule_chunked):
        o, final = form(
            q,
            k,
            v,
            beta,
            g,
            scale=2.0,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=None,
            normalize_qk=False,
        )
        torch.testing.assert_close(o.flatten(), torch.tensor([4.0, 2.56]))
        torch.testing.assert_close(final.flatten(), torch.tensor([1.12, 0.16]))
    default = delta_rule(q, k, v, beta, g, initial_state=state)[0]
    torch.testing.assert_close(default, o * 2**-0.5 / 2)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    tensors = inputs(18, gate, B=1, H=1, HV=2, K=2, V=2)
    names = list(tensors)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, values))
        main = [named.pop(name) for name in ("q", "k", "v", "beta")]
        return delta_rule_chunked(
            *main,
            named.get("g"),
            scale=0.7,
            initial_state=named["initial_state"],
            output_final_state=True,
            cu_seqlens=None,
            normalize_qk=True,
            chunk_size=16,
        )

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [(1, 70, 0, 16, 33, 0, 1), (64, 64), (0, 0, 3), (200,)])
def test_packed_equals_each_sequence_alone(lengths: tuple[int, ...], gate: str) -> None:
    tensors = inputs(sum(lengths), gate, B=1, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = run(delta_rule_chunked, tensors, cu_seqlens=cu_seqlens, normalize_qk=True)
    assert_close(run(delta_rule_reference, tensors, cu_seqlens=cu_seqlens, normalize_qk=True), packed, 1e-12)

    outputs, states = [], []
    for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        state = tensors["initial_state"][n : n + 1]
        if end > start:
            part = {name: x[:, start:end] for name, x in tensors.items() if name != "initial_state"}
            o, state = delta_rule(
                *(part[name] for name in ("q", "k", "v", "beta")),
                part.get("g"),
                scale=0.7,
                initial_state=state,
                output_final_state=True,
                normalize_qk=True,
            )
            outputs.append(o)
        states.append(state)
    alone = run(lambda *_, **__: (torch.cat(outputs, 1), torch.cat(states)), tensors)
    assert_close(packed, alone, 1e-12)


@pytest.mark.parametrize("most", [1, 3, 8, 1000])
@pytest.mark.parametrize("lengths", [(150, 70, 20, 150, 64, 3), (40, 40, 40, 17, 17), (128, 130, 128)])
def test_slabs_of_few_chunks_and_heads_change_nothing(
    lengths: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that end in the middle of a slab or between two, several runs of equal lengths, groups of one head."""
    monkeypatch.setattr(importlib.import_module("kernels.delta_rule.chunked"), "SLAB", most)
    tensors = inputs(sum(lengths), "head", B=1, N=len(lengths), H=3, HV=6, K=4, V=5)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = run(delta_rule_chunked, tensors, cu_seqlens=cu_seqlens, normalize_qk=True, chunk_size=16)
    assert_close(found, run(delta_rule_reference, tensors, cu_seqlens=cu_seqlens, normalize_qk=True), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fading_decays_end_before_denormal_numbers(dtype: torch.dtype) -> None:
    """Of every pair of tokens: the product of the decays between them, or 0; times a small input still a normal number."""
    g = torch.full((64, 1), -1.5 if dtype == torch.float32 else -12.0, dtype=dtype)
    layout = chunk_layout(g[None], None, 1, 64, None, 1, False)
    pairs = gates(torch.ones_like(g), g, layout, 1, dtype).pairs(slice(0, 1), Pairs(1, 64, g))[0]
    steps = torch.arange(64, dtype=torch.float64)
    wanted = ((steps[:, None] - steps) * g[0].double()).exp().tril()
    assert ((wanted > 0) & (wanted < torch.finfo(dtype).tiny)).any()
    kept = pairs > 0
    assert torch.equal(kept, (wanted > torch.finfo(dtype).tiny ** 0.8))
    torch.testing.assert_close(pairs[kept].double(), wanted[kept], rtol=100 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_two_halves_joined_by_the_state_equal_one_call(cut: int, gate: str) -> None:
    tensors = inputs(130, gate)

    def halves(q, k, v, beta, g, *, initial_state, **options):  # type: ignore[no-untyped-def]
        state, parts = initial_state, []
        for where in (slice(0, cut), slice(cut, None)):
            gates = None if g is None else g[:, where]
            o, state = delta_rule(*(x[:, where] for x in (q, k, v, beta)), gates, initial_state=state, **options)
            parts.append(o)
        return torch.cat(parts, 1), state

    assert_close(run(halves, tensors), run(delta_rule, tensors), 1e-12)


@pytest.mark.parametrize("normalize_qk", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_decoding_token_by_token_equals_one_call(gate: str, normalize_qk: bool) -> None:
    tensors = inputs(20, gate)

    def decode(q, k, v, beta, g, *, scale, initial_state, normalize_qk, **_):  # type: ignore[no-untyped-def]
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            gates = None if g is None else g[:, t]
            step = (x[:, t] for x in (q, k, v, beta))
            o, state = delta_rule_step(*step, gates, state, scale=scale, normalize_qk=normalize_qk)
            outputs.append(o)
        return torch.stack(outputs, 1), state

    whole = run(delta_rule, tensors, normalize_qk=normalize_qk)
    assert_close(run(decode, tensors, normalize_qk=normalize_qk), whole, 1e-12)

    with torch.no_grad():  # what generation does: one state, overwritten
        state = tensors["initial_state"].clone()
        arguments = {"g": None, "scale": 0.7, "normalize_qk": normalize_qk, **tensors, "initial_state": state}
        o, final = decode(**arguments)
        assert final.data_ptr() == state.data_ptr()
        assert_close({"o": o, "state": state}, {"o": whole["o"], "state": whole["state"]}, 1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_strided_views_serve_as_well(gate: str) -> None:
    """A fused projection hands out slices; a summed loss hands back an expanded gradient."""
    tensors = inputs(33, gate)
    fused = torch.cat([tensors["q"], tensors["k"], tensors["k"]], -1).detach().requires_grad_()
    grads = []
    for contiguous in (False, True):
        q, k = fused[..., :8], fused[..., 8:16]
        if contiguous:
            q, k = q.contiguous(), k.contiguous()
        o, _ = delta_rule(q, k, tensors["v"], tensors["beta"], tensors.get("g"))
        grads.append(torch.autograd.grad(o.sum(), fused)[0])
    assert torch.equal(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


def test_autocast_changes_nothing() -> None:
    tensors = inputs(70, "head", dtype=torch.float32)
    plain = run(delta_rule_chunked, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(delta_rule_chunked, tensors)
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


def test_without_gradients_the_result_is_the_same() -> None:
    tensors = inputs(70, "channel")
    recorded = delta_rule(*(tensors[name] for name in ("q", "k", "v", "beta", "g")))[0]
    with torch.no_grad():
        assert torch.equal(recorded, delta_rule(*(tensors[name] for name in ("q", "k", "v", "beta", "g")))[0])
    assert recorded.requires_grad
