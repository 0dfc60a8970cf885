"""The Triton delta rule against the defining loop in float64, forward and gradients, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.common.chunks import packed_chunks
from kernels.common.segments import segments_of
from kernels.delta_rule import triton_shape
from kernels.delta_rule.reference import delta_rule_reference
from kernels.delta_rule.triton import delta_rule_triton

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
PACKED = [0, 0, 1, 20, 20, 57, 57]  # empty sequences, one of length 1, lengths that are no multiple of a chunk
GATES = ("none", "head", "channel")
SHAPES = [  # B, T, H, HV, K, V, normalize, state; and the gate that every run tries, the others in a campaign
    (1, 1, 1, 1, 16, 16, False, True, "none"),
    (2, 15, 1, 2, 16, 32, True, True, "head"),
    (1, 17, 2, 2, 32, 16, False, False, "channel"),
    (1, 64, 1, 1, 16, 16, True, False, "none"),
    (1, 65, 1, 3, 16, 16, True, True, "channel"),
    (1, 70, 1, 1, 100, 48, True, True, "head"),
]


def long(*values):
    return pytest.param(*values, marks=pytest.mark.campaign)


def inputs(B, T, H, HV, K, V, gate, *, N=None, state=True, strength=0.5) -> list[Tensor | None]:
    torch.manual_seed(B * 1000 + T)
    q = torch.randn(B, T, H, K)
    # Keys that share a direction make the triangular systems ill-behaved, as real ones do.
    k = torch.nn.functional.normalize(torch.randn(B, T, H, K) + 0.3, dim=-1)
    v, beta = torch.randn(B, T, HV, V), torch.rand(B, T, HV) * 1.8
    shape = {"none": None, "head": (B, T, HV), "channel": (B, T, HV, K)}[gate]
    g = None if shape is None else -torch.rand(shape) * strength
    return [q, k, v, beta, g, torch.randn(N or B, HV, K, V) if state else None]


def run(form, tensors, scale, cu_seqlens, normalize, cotangents):
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    o, final = form(
        *leaves[:5],
        scale=scale,
        initial_state=leaves[5],
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        normalize_qk=normalize,
    )
    wanted = {name: x for name, x in zip(NAMES, leaves) if x is not None}
    do, d_final = (c.to(o.dtype) for c in cotangents)
    gradients = torch.autograd.grad((o * do).sum() + (final * d_final).sum(), list(wanted.values()))
    return {"o": o.detach(), "final": final.detach(), **{f"d{n}": x for n, x in zip(wanted, gradients)}}


def compare(tensors, *, cu=None, normalize=False, limit=1e-5):
    K = tensors[0].shape[-1]
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    N = tensors[0].shape[0] if cu is None else len(cu) - 1
    HV, V = tensors[2].shape[2:]
    cotangents = torch.randn(tensors[2].shape), torch.randn(N, HV, K, V)
    ours = run(delta_rule_triton, tensors, K**-0.5, cu_seqlens, normalize, cotangents)
    exact = [None if x is None else x.double() for x in tensors]
    truth = run(delta_rule_reference, exact, K**-0.5, cu_seqlens, normalize, cotangents)
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, name
        assert ours[name].isfinite().all(), name
        error = (ours[name].double() - expected).norm() / expected.norm().clamp_min(1e-20)
        assert error < limit, f"{name}: relative RMS error {error:.1e}"


@pytest.mark.parametrize(
    ("gate", "B", "T", "H", "HV", "K", "V", "normalize", "state"),
    [(gate, *shape) if gate == always else long(gate, *shape) for gate in GATES for *shape, always in SHAPES],
)
def test_dense(gate, B, T, H, HV, K, V, normalize, state):
    compare(inputs(B, T, H, HV, K, V, gate, state=state), normalize=normalize)


@pytest.mark.parametrize("gate", GATES)
def test_packed(gate):
    compare(inputs(1, 57, 1, 2, 16, 16, gate, N=6), cu=PACKED, normalize=True)


def test_head_and_wide_values():
    compare(inputs(1, 33, 1, 1, 16, 128, "head"))
    compare(inputs(1, 33, 1, 1, 64, 100, "head"))


def test_head_over_many_chunks():
    compare(inputs(1, 200, 1, 1, 16, 16, "head"))


@pytest.mark.parametrize(
    ("gate", "cu", "K"), [long("head", None, 16), ("head", PACKED, 16), ("none", None, 100), ("channel", PACKED, 16)]
)
def test_segments_join_to_the_whole(gate, cu, K):
    with tuning.override({"delta_rule_segments": {"CHUNKS": 1}}):
        B = 2 if cu is None and K < 64 else 1
        tensors = inputs(B, 57 if cu else 70, 1, 2 if K < 64 else 1, K, 16, gate, N=None if cu is None else 6)
        compare(tensors, cu=cu, normalize=True)


@pytest.mark.parametrize(
    ("gate", "cu"),
    [
        ("none", None),
        long("none", PACKED),
        long("head", None),
        ("head", PACKED),
        long("channel", None),
        ("channel", PACKED),
    ],
)
def test_descriptors(gate, cu, monkeypatch):
    monkeypatch.setattr(triton_shape, "descriptors_pay", lambda device: True)
    T = 64 if cu is None else 57
    compare(inputs(1, T, 1, 2, 16, 32, gate, N=None if cu is None else 6), cu=cu, normalize=True)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_extreme_gates(gate):
    tensors = inputs(1, 40, 1, 1, 16, 16, gate)
    g = tensors[4]
    assert g is not None
    g[:, ::7] = 0.0
    g[:, 3::7] = -20.0
    g[:, 5::13] = -300.0
    compare(tensors)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_extreme_gate_that_erases(gate):
    tensors = inputs(1, 40, 1, 1, 16, 16, gate)
    g = tensors[4]
    assert g is not None
    q, k, v, beta, _, state = tensors
    g[:, 21] = -torch.inf
    options = {"scale": 0.25, "output_final_state": True, "cu_seqlens": None, "normalize_qk": False}
    o, final = delta_rule_triton(q, k, v, beta, g, initial_state=state, **options)
    tail = [x[:, 21:] for x in (q, k, v, beta, g)]
    tail[4] = tail[4].clone()
    tail[4][:, 0] = 0.0
    exact = [x.double() for x in tail]
    expected, expected_final = delta_rule_reference(*exact, initial_state=None, **options)
    assert (o[:, 21:].double() - expected).norm() < 1e-5 * expected.norm()
    assert (final.double() - expected_final).norm() < 1e-5 * expected_final.norm()


def test_tables_of_packed_chunks_and_segments():
    cu = torch.tensor([0, 0, 1, 5, 5, 13, 13], dtype=torch.int32)
    chunks = packed_chunks(cu, 13, 2)
    assert packed_chunks(cu, 13, 2) is chunks
    assert chunks.offsets.tolist() == [0, 0, 1, 3, 3, 7, 7]
    assert chunks.indices[:7].tolist() == [[1, 0], [2, 0], [2, 1], [4, 0], [4, 1], [4, 2], [4, 3]]
    assert (chunks.indices[7:, 0] == -1).all() and chunks.count == 12
    segments = segments_of(chunks, cu, 4, cu.device)
    assert segments.first.tolist() == [0, 0, 1, 2, 2, 4, 4]
    assert segments.begins[:5].tolist() == [0, 1, 5, 9, 13] and (segments.begins[4:] == 13).all()
    assert segments.slots[:4].tolist() == [0, 1, 3, 5]
    cu[1] = 1  # a change in place is noticed
    assert packed_chunks(cu, 13, 2).offsets.tolist() == [0, 1, 1, 3, 3, 7, 7]


def test_tables_of_dense_segments():
    from kernels.common.chunks import dense_chunks

    segments = segments_of(dense_chunks(2, 10, 2), None, 4, torch.device("cpu"))
    assert segments.begins.tolist() == [0, 4, 8, 10, 14, 18, 20]
    assert segments.slots.tolist() == [0, 2, 4, 5, 7, 9]
    assert segments.first.tolist() == [0, 3, 6]
