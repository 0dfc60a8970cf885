"""A sequence cut in spans and joined again is the whole sequence, in value and gradient."""

import pytest
import torch

from kernels.gated_linear_attention import gated_linear_attention
from kernels.gated_linear_attention.context import merge, states_before, summarize
from tests.kernels.gated_linear_attention_cases import GATES, make, relative_errors, run


def in_spans(cuts):
    """An operator that computes each span from the merged summaries of the earlier ones."""

    def form(q, k, v, g, *, initial_state, output_final_state, cu_seqlens):
        spans = list(zip([0, *cuts], [*cuts, q.shape[1]]))
        parts = [[t if t is None else t[:, a:b] for t in (q, k, v, g)] for a, b in spans]
        states = states_before([summarize(*part[1:]) for part in parts], initial_state)
        outputs = [gated_linear_attention(*part, initial_state=s)[0] for part, s in zip(parts, states)]
        return torch.cat(outputs, 1), states[-1]

    return form


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cuts", [[40], [1, 70], [20, 21, 89]])
@pytest.mark.parametrize("strength", [0.3, 20.0])
def test_spans_join_to_the_whole(gate, cuts, strength):
    inputs = make(2, 90, 2, 8, 4, groups=2, gate=gate, strength=strength)
    assert max(relative_errors(run(in_spans(cuts), inputs), run(gated_linear_attention, inputs))) < 1e-11


@pytest.mark.parametrize("gate", GATES)
def test_merge_is_associative_and_equals_one_summary(gate):
    _, k, v, g, _ = make(1, 30, 2, 4, 3, gate=gate)
    spans = [slice(i, i + 10) for i in (0, 10, 20)]
    a, b, c = (summarize(k[:, s], v[:, s], None if g is None else g[:, s]) for s in spans)
    whole = summarize(k, v, g)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c))):
        torch.testing.assert_close(merged.state, whole.state, atol=1e-12, rtol=1e-12)
        assert (merged.decay is None) == (gate == "none")
        if merged.decay is not None:
            torch.testing.assert_close(merged.decay, whole.decay, atol=1e-12, rtol=1e-12)


def test_bf16_is_summed_in_fp32():
    _, k, v, g, _ = make(1, 30, 1, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summary = summarize(k, v, g)
    assert summary.state.dtype == torch.float32
    exact = summarize(k.double(), v.double(), g.double())
    torch.testing.assert_close(summary.state.double(), exact.state, atol=1e-5, rtol=1e-5)
