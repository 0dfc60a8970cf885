"""The selective scan: the chunk form against the recurrence, in value and in every gradient."""

import importlib
import itertools

import pytest
import torch

from kernels.state_space import selective_scan, selective_scan_step
from kernels.state_space.chunked import selective_scan_chunked as chunked
from kernels.state_space.reference import selective_scan_reference as reference

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)


def make(b, T, D, N, *, sequences=None, dtype=torch.float64, strength=1.0, seed=0):
    """x, dt, A, B, C, D, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    dt = torch.nn.functional.softplus(draw(b, T, D)) * strength
    A = -torch.exp(draw(D, N))
    tensors = [draw(b, T, D), dt, A, draw(b, T, N), draw(b, T, N), draw(D), draw(sequences or b, D, N)]
    dtypes = [dtype, dtype, wide, dtype, dtype, wide, wide]
    return [t.to(d) for t, d in zip(tensors, dtypes)]


def run(form, inputs, *, state=True, skip=True, **options):
    """[y, final state, then the gradient of each input that is there]."""
    x, dt, A, B, C, D, initial = (t.detach().clone().requires_grad_() for t in inputs)
    D, initial = D if skip else None, initial if state else None
    y, final = form(x, dt, A, B, C, D, initial_state=initial, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    dfinal = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final.dtype)
    leaves = [t for t in (x, dt, A, B, C, D, initial) if t is not None]
    return [y, final, *torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), leaves)]


def worst(ours, theirs):
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape and bool(a.isfinite().all())
        errors.append(float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return max(errors)


def double(inputs):
    return [t.double() for t in inputs]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunked_is_the_recurrence(T, dtype, tolerance):
    inputs = make(2, T, 5, 3, dtype=dtype)
    assert worst(run(chunked, inputs), run(reference, double(inputs))) < tolerance
    bare = {"state": False, "skip": False}
    assert worst(run(chunked, inputs, **bare), run(reference, double(inputs), **bare)) < tolerance


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100])
@pytest.mark.parametrize("block", [1, 3000])
def test_any_chunk_and_block_size(chunk_size, block, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kernels.state_space.chunked"), "BLOCK_BYTES", block)
    inputs = make(2, 40, 5, 3)
    assert worst(run(chunked, inputs, chunk_size=chunk_size), run(reference, inputs)) < 1e-12


@pytest.mark.parametrize("lengths", [[70, 1, 64, 3, 129], [0, 5, 0, 17, 0], [1, 1, 1]])
def test_packed_is_each_sequence_alone(lengths):
    inputs = make(1, sum(lengths), 4, 3, sequences=len(lengths))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    def each_alone(x, dt, A, B, C, D, *, initial_state, output_final_state, cu_seqlens):
        outputs, states = [], []
        for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            first = initial_state[n : n + 1]
            if a == b:
                states.append(first)
                continue
            span = slice(a, b)
            y, state = reference(
                x[:, span], dt[:, span], A, B[:, span], C[:, span], D, initial_state=first, output_final_state=True
            )
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    ours = run(chunked, inputs, cu_seqlens=cu_seqlens)
    assert worst(ours, run(each_alone, inputs, cu_seqlens=cu_seqlens)) < 1e-12
    assert worst(ours, run(reference, inputs, cu_seqlens=cu_seqlens)) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("strength", [0.0, 30.0, 1e4])
def test_extreme_steps(strength, dtype, tolerance):
    """dt = 0 holds the state, a huge dt replaces it."""
    inputs = make(1, 70, 4, 3, strength=strength, dtype=dtype)
    assert worst(run(chunked, inputs), run(reference, double(inputs))) < tolerance


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(1, 6, 2, 2, sequences=2)]
    cu_seqlens = torch.tensor([0, 1, 6], dtype=torch.int32)

    def call(*t):
        return chunked(*t[:6], initial_state=t[6], output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=2)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("cut", [1, 40, 64])
def test_two_halves_and_decoding_equal_one_shot(cut):
    x, dt, A, B, C, D, initial = make(2, 90, 4, 3)

    def part(span, state):
        return selective_scan(
            x[:, span], dt[:, span], A, B[:, span], C[:, span], D, initial_state=state, output_final_state=True
        )

    whole, last = part(slice(None), initial)
    first, state = part(slice(0, cut), initial)
    second, final = part(slice(cut, None), state)
    assert worst([torch.cat([first, second], 1), final], [whole, last]) < 1e-12
    outputs = []
    for t in range(cut, 90):
        y, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    assert worst([torch.stack(outputs, 1), state], [second, final]) < 1e-12


def test_bf16_inputs_fp32_scan():
    inputs = make(1, 200, 8, 4, dtype=torch.bfloat16)
    ours = run(chunked, inputs)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert worst(ours, run(reference, double(inputs))) < 0.005


def test_autocast_and_the_callers_state_are_left_alone():
    inputs = make(1, 20, 4, 3, dtype=torch.float32)
    state = inputs[6].clone()
    plain, none = selective_scan(*inputs[:6], initial_state=inputs[6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = selective_scan(*inputs[:6], initial_state=inputs[6])
    assert none is None and torch.equal(cast, plain) and torch.equal(state, inputs[6])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"x": torch.zeros(8, 4)}, "x must"),
        ({"dt": torch.zeros(1, 8, 5)}, "dt must"),
        ({"A": torch.zeros(5, 3)}, "A must"),
        ({"B": torch.zeros(1, 8, 4)}, "B must"),
        ({"D": torch.zeros(3)}, "D must"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens"),
    ],
)
def test_mistakes_are_named(change, word):
    arguments = {
        "x": torch.zeros(1, 8, 4),
        "dt": torch.zeros(1, 8, 4),
        "A": torch.zeros(4, 3),
        "B": torch.zeros(1, 8, 3),
        "C": torch.zeros(1, 8, 3),
    }
    with pytest.raises(ValueError, match=word):
        selective_scan(**(arguments | change))
