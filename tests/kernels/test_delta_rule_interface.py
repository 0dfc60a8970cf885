"""The delta rule's public face: what it refuses, which form it picks, and the pieces for context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import delta_rule
from kernels.delta_rule import FORMS, request
from kernels.delta_rule.context import merge, summarize
from kernels.delta_rule.decode import delta_rule_step
from kernels.dispatch import Request, choose, explain
from tests.kernels.delta_rule_cases import GATES, assert_close, inputs, run


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "q must be"),
        ({"q": torch.zeros(2, 0, 2, 8)}, "q must be"),
        ({"q": torch.zeros(2, 5, 2, 8, dtype=torch.int64)}, "q must be float32"),
        ({"k": torch.zeros(2, 5, 2, 9)}, "k must be"),
        ({"k": torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)}, "k is torch.bfloat16"),
        ({"v": torch.zeros(2, 6, 4, 6)}, "v must be"),
        ({"v": torch.zeros(2, 5, 3, 6)}, "v has 3 heads"),
        ({"v": torch.zeros(2, 5, 4, 6, dtype=torch.float64)}, "v is torch.float64"),
        ({"beta": torch.zeros(2, 5, 2)}, "beta must be"),
        ({"beta": torch.zeros(2, 5, 4, dtype=torch.bool)}, "beta must be a floating"),
        ({"g": torch.zeros(2, 5, 2)}, "g must be"),
        ({"g": torch.zeros(2, 5, 4, 6)}, "g must be"),
        ({"initial_state": torch.zeros(2, 4, 6, 8)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], named: str) -> None:
    right: dict[str, Any] = {
        "q": torch.zeros(2, 5, 2, 8),
        "k": torch.zeros(2, 5, 2, 8),
        "v": torch.zeros(2, 5, 4, 6),
        "beta": torch.zeros(2, 5, 4),
    }
    delta_rule(**right)
    with pytest.raises(ValueError, match=named):
        delta_rule(**{**right, **change})


@pytest.mark.parametrize("marks", [[0, 3], [1, 5], [0, 4, 3, 5], [0.0, 5.0]])
def test_wrong_sequence_marks(marks: list[float]) -> None:
    cu_seqlens = torch.tensor(marks)
    with pytest.raises(ValueError, match="cu_seqlens"):
        x = torch.zeros(1, 5, 2, 8)
        delta_rule(x, x, x, torch.zeros(1, 5, 2), cu_seqlens=cu_seqlens if marks[-1] == 5.0 else cu_seqlens.int())


def test_wrong_arguments_of_a_step() -> None:
    x, state = torch.zeros(1, 2, 8), torch.zeros(1, 4, 8, 6)
    v, beta = torch.zeros(1, 4, 6), torch.zeros(1, 4)
    delta_rule_step(x, x, v, beta, None, state)
    with pytest.raises(ValueError, match="beta must be"):
        delta_rule_step(x, x, v, beta[:, :2], None, state)
    with pytest.raises(ValueError, match="q must be"):
        delta_rule_step(x[:, :, :4], x, v, beta, None, state)


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAID_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = inputs(20, "channel", dtype=torch.float32)
    asked = request(tensors["q"], tensors["v"], tensors["g"], None)
    assert asked.options == {"gate": "channel", "packed": False}
    assert asked.shape == {"B": 2, "T": 20, "H": 2, "HV": 4, "K": 8, "V": 6, "N": 2}
    assert [form.name for form in FORMS] == ["triton", "chunked", "reference"]
    assert choose(FORMS, asked).name == "chunked"
    chunked = run(delta_rule, tensors)
    monkeypatch.setenv("BRAID_KERNELS", "reference")
    assert_close(run(delta_rule, tensors), chunked, 1e-5)
    monkeypatch.setenv("BRAID_KERNELS", "triton")
    with pytest.raises(ValueError, match="CUDA"):
        run(delta_rule, tensors)


def test_the_fused_form_states_its_limit() -> None:
    wide = Request("delta_rule", torch.device("cuda"), torch.bfloat16, {"K": 512, "V": 64}, {"gate": "none"})
    assert "256" in dict(explain(FORMS, wide))["triton"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cuts", [(70,), (1, 64), (20, 50, 99)])
def test_a_sequence_cut_over_ranks_equals_one_call(cuts: tuple[int, ...], gate: str) -> None:
    """Every rank summarises its tokens, receives all summaries, and starts from what those before it leave."""
    tensors = inputs(130, gate)

    def ranks(q, k, v, beta, g, *, initial_state, **options):  # type: ignore[no-untyped-def]
        spans = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, None))]
        gates = [None if g is None else g[:, span] for span in spans]
        summaries = [
            summarize(k[:, span], v[:, span], beta[:, span], gate, normalize_qk=options["normalize_qk"])
            for span, gate in zip(spans, gates)
        ]
        outputs = []
        for rank, span in enumerate(spans):
            state = merge(summaries[:rank], initial_state)
            o, final = delta_rule(*(x[:, span] for x in (q, k, v, beta)), gates[rank], initial_state=state, **options)
            outputs.append(o)
        return torch.cat(outputs, 1), final

    assert_close(run(ranks, tensors, normalize_qk=True), run(delta_rule, tensors, normalize_qk=True), 1e-11)


def test_summaries() -> None:
    tensors = inputs(10, "head", dtype=torch.bfloat16)
    state, transition = summarize(*(tensors[name] for name in ("k", "v", "beta", "g")))
    assert state.shape == (2, 4, 8, 6)
    assert transition.shape == (2, 4, 8, 8)
    assert state.dtype == transition.dtype == torch.float32
    assert merge([]) is None
    assert torch.equal(merge([(state, transition)]), state)
