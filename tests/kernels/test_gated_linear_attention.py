"""Gated linear attention: the chunk form against the recurrence, in value and in every gradient."""

import itertools

import pytest
import torch

from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from kernels.gated_linear_attention.chunked import gated_linear_attention_chunked as chunked
from kernels.gated_linear_attention.reference import gated_linear_attention_reference as reference
from tests.kernels.gated_linear_attention_cases import GATES, make, relative_errors, run

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunked_is_the_recurrence(T, gate, dtype, tolerance):
    inputs = make(2, T, 2, 8, 12, gate=gate, dtype=dtype)
    truth = run(reference, [None if t is None else t.double() for t in inputs])
    assert max(relative_errors(run(chunked, inputs), truth)) < tolerance


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_other_chunk_sizes_and_scales(gate, chunk_size):
    inputs = make(1, 70, 2, 8, 4, gate=gate)
    ours = run(chunked, inputs, chunk_size=chunk_size, scale=-0.7)
    assert max(relative_errors(ours, run(reference, inputs, scale=-0.7))) < 1e-12


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("strength", [0.2, 8.0])
def test_grouped_value_heads(gate, strength):
    inputs = make(2, 70, 2, 8, 4, groups=3, gate=gate, strength=strength)
    assert max(relative_errors(run(chunked, inputs), run(reference, inputs))) < 1e-12


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("strength", [0.5, 1.5, 4.0, 20.0, 300.0])
def test_any_strength_of_decay(gate, strength, dtype, tolerance):
    """From decays that the fast factors hold, over every block size of the halving, to decays that erase each token."""
    inputs = make(1, 130, 2, 8, 4, gate=gate, strength=strength, dtype=dtype)
    truth = run(reference, [t.double() for t in inputs])
    assert max(relative_errors(run(chunked, inputs), truth)) < tolerance


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("value", [-20.0, -1e4, float("-inf"), 0.0])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_extreme_gates(gate, value, share, dtype, tolerance):
    """All gates at an extreme, or a tenth of them among gentle ones: strong resets must not blur their neighbours."""
    q, k, v, g, state = make(1, 130, 2, 8, 4, gate=gate, strength=0.1, dtype=dtype)
    mask = torch.rand(g.shape, generator=torch.Generator().manual_seed(3)) < share
    g = g.masked_fill(mask, value)
    truth = run(reference, [t.double() for t in (q, k, v, g, state)])
    if value == float("-inf"):  # autograd through exp(-inf) times a state is 0 there, as it should be
        assert bool(truth[5].isfinite().all())
    ours = run(chunked, (q, k, v, g, state))
    for name, a, b in zip(("o", "final", "dq", "dk", "dv", "dg", "dinitial"), ours, truth):
        assert bool(a.isfinite().all()), name
        # Where nothing passes the gates their gradient vanishes; a channel's is then noise of a difference of numbers near 1.
        floor = 0.1 if name == "dg" and gate == "channel" else 1e-30
        assert float((a - b).detach().norm() / b.detach().norm().clamp(min=floor)) < tolerance, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [[70, 1, 64, 3, 129], [0, 5, 0, 17, 0], [1, 1, 1], [0, 0, 2]])
def test_packed_is_each_sequence_alone(gate, lengths):
    inputs = make(1, sum(lengths), 2, 8, 4, groups=2, gate=gate, N=len(lengths))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ours = run(chunked, inputs, cu_seqlens=cu_seqlens)

    def each_alone(q, k, v, g, *, initial_state, output_final_state, cu_seqlens):
        outputs, states = [], []
        for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            if a == b:
                states.append(initial_state[n : n + 1])
                continue
            span = (t if t is None else t[:, a:b] for t in (q, k, v, g))
            o, state = reference(*span, initial_state=initial_state[n : n + 1], output_final_state=True)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    assert max(relative_errors(ours, run(each_alone, inputs, cu_seqlens=cu_seqlens))) < 1e-12
    assert max(relative_errors(ours, run(reference, inputs, cu_seqlens=cu_seqlens))) < 1e-12
    assert run(chunked, inputs, cu_seqlens=cu_seqlens, state=False)[0].shape == inputs[2].shape


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_any_size(gate, size, packed, monkeypatch):
    """However the chunk list is cut, and wherever a cut meets the batch rows, the result is one."""
    import importlib

    module = importlib.import_module("kernels.gated_linear_attention.chunked")
    inputs = make(1 if packed else 3, 180 if packed else 70, 1, 8, 4, gate=gate, N=3)
    cu_seqlens = torch.tensor([0, 20, 120, 180], dtype=torch.int32) if packed else None
    operands = module._operands

    def small(*arguments):
        x = operands(*arguments)
        return x.__class__(**{**x.__dict__, "size": size})

    monkeypatch.setattr(module, "_operands", small)
    ours = run(chunked, inputs, cu_seqlens=cu_seqlens, chunk_size=16)
    assert max(relative_errors(ours, run(reference, inputs, cu_seqlens=cu_seqlens))) < 1e-12


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_gradcheck(gate, strength):
    q, k, v, g, state = make(1, 5, 1, 3, 2, gate=gate, groups=1 if gate == "channel" else 2, N=2, strength=strength)
    cu_seqlens = torch.tensor([0, 1, 5], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (q, k, v, g, state) if t is not None]

    def call(q, k, v, *rest):
        g, state = rest if len(rest) == 2 else (None, rest[0])
        return chunked(q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=4)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [1, 40, 64])
def test_two_halves_and_decoding_equal_one_shot(gate, cut):
    q, k, v, g, initial = make(2, 90, 2, 8, 4, groups=2, gate=gate)

    def part(span, state):
        inputs = (t if t is None else t[:, span] for t in (q, k, v, g))
        return gated_linear_attention(*inputs, initial_state=state, output_final_state=True)

    whole, last = part(slice(None), initial)
    first, state = part(slice(0, cut), initial)
    second, final = part(slice(cut, None), state)
    assert max(relative_errors([torch.cat([first, second], 1), final], [whole, last])) < 1e-12
    outputs = []
    for t in range(cut, 90):
        o, state = gated_linear_attention_step(q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], state)
        outputs.append(o)
    assert max(relative_errors([torch.stack(outputs, 1), state], [second, final])) < 1e-12


@pytest.mark.parametrize("gate, groups", [("none", 1), ("head", 1), ("head", 2), ("channel", 1)])
@pytest.mark.parametrize("strength", [0.1, 5.0])
def test_bf16(gate, groups, strength):
    """Operands round to bf16, gates and states do not: RMS errors within what published kernels allow themselves."""
    inputs = make(1, 512, 2, 32, 32, gate=gate, groups=groups, dtype=torch.bfloat16, strength=strength)
    ours = run(chunked, inputs)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    names = [n for n in ("o", "final", "dq", "dk", "dv", "dg", "dinitial") if n != "dg" or gate != "none"]
    errors = dict(zip(names, relative_errors(ours, run(reference, [t if t is None else t.double() for t in inputs]))))
    assert errors.pop("dg", 0.0) < 0.02, errors
    assert max(errors.values()) < 0.005, errors


def test_fp16_widens():
    inputs = make(1, 40, 1, 8, 8, dtype=torch.float16)
    ours = run(chunked, inputs)
    assert ours[0].dtype == torch.float16
    assert max(relative_errors(ours, run(reference, [t.double() for t in inputs]))) < 1e-3


def test_memory_of_a_call_grows_linearly_with_length():
    """Bytes kept for the backward: twice the tokens, twice the bytes."""

    def kept(T):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        q, k, v, g, _ = make(1, T, 2, 8, 8)
        leaves = [t.requires_grad_() for t in (q, k, v, g)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            chunked(*leaves)
        return total

    assert kept(1024) == 2 * kept(512)


def test_strided_inputs_no_grad_and_autocast():
    q, k, v, g, _ = make(2, 70, 2, 8, 8, dtype=torch.float32)
    wide = torch.cat([q, k, v], -1)
    views = wide.split(8, -1)
    plain, none = gated_linear_attention(q, k, v, g)
    assert none is None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = gated_linear_attention(*views, g)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


def test_initial_state_is_left_alone():
    q, k, v, g, state = make(1, 20, 1, 4, 4)
    before = state.clone()
    gated_linear_attention(q, k, v, g, initial_state=state)
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"q": torch.zeros(1, 8, 4)}, "q must"),
        ({"k": torch.zeros(1, 8, 2, 5)}, "k must"),
        ({"v": torch.zeros(1, 8, 3, 4)}, "multiple"),
        ({"v": torch.zeros(1, 9, 2, 4)}, "v must"),
        ({"g": torch.zeros(1, 8, 3)}, "g must"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, "initial_state"),
        ({"v": torch.zeros(1, 8, 2, 4, dtype=torch.bfloat16)}, "v is"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 8], dtype=torch.int32)}, "cu_seqlens"),
    ],
)
def test_mistakes_are_named(change, word):
    zeros = torch.zeros(1, 8, 2, 4)
    arguments = {"q": zeros, "k": zeros, "v": zeros} | change
    with pytest.raises(ValueError, match=word):
        gated_linear_attention(**arguments)


def test_chunk_size_must_be_a_power_of_two():
    zeros = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match="chunk_size"):
        chunked(zeros, zeros, zeros, chunk_size=48)
