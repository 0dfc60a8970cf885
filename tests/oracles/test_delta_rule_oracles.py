"""The delta rule against other people's implementations: flash-linear-attention's naive forms, transformers' torch forms.

They compute in fp32 and in another order (cumulative sums of g, corrected values rather than errors), so they agree with
ours as two fp32 results do, not to the bit: 1e-5 relative RMS here, an order above the 1e-6 of a chain of some 200 fp32
steps and an order below any error of formula. Where a peer overflows or loses precision we do not compare.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import delta_rule
from kernels.delta_rule.chunked import delta_rule_chunked
from tests.kernels.delta_rule_cases import assert_close, inputs, run

TOLERANCE = 1e-5
SCALE = 16**-0.5


def case(gate: str, T: int, groups: int = 1, **options: Any) -> dict[str, Tensor]:
    return inputs(T, gate, H=2, HV=2 * groups, K=16, V=24, dtype=torch.float32, **options)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The torch form itself: transformers hands the name to fla's Triton kernel when fla is installed."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("T", [64, 150])
def test_transformers_qwen3_next(T: int, groups: int) -> None:
    peer = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    tensors = case("head", T, groups)
    ours = run(delta_rule, tensors, scale=None, normalize_qk=True)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = plain(getattr(peer, name))

        def theirs(q, k, v, beta, g, *, initial_state, function=function, **_):  # type: ignore[no-untyped-def]
            return function(
                q,
                k,
                v,
                g=g,
                beta=beta,
                initial_state=initial_state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )

        if "recurrent" in name:
            with torch.no_grad():  # it writes into views that autograd would need
                o, state = theirs(**{k: v.detach().clone() for k, v in tensors.items()})
            assert_close({"o": o, "state": state}, {k: ours[k] for k in ("o", "state")}, TOLERANCE)
        else:
            assert_close(run(theirs, tensors), ours, TOLERANCE)


@pytest.mark.parametrize("T", [64, 150])
def test_transformers_kimi_linear(T: int) -> None:
    peer = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    chunk, recurrent = plain(peer.chunk_kimi_delta_attention), plain(peer.recurrent_kimi_delta_attention)
    tensors = case("channel", T)

    def theirs(q, k, v, beta, g, *, initial_state, function=chunk, **_):  # type: ignore[no-untyped-def]
        return function(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    ours = run(delta_rule, tensors, scale=None, normalize_qk=True)
    assert_close(run(theirs, tensors), ours, TOLERANCE)
    with torch.no_grad():
        o, state = theirs(**{k: v.detach().clone() for k, v in tensors.items()}, function=recurrent)
    assert_close({"o": o, "state": state}, {k: ours[k] for k in ("o", "state")}, TOLERANCE)


@pytest.mark.parametrize("T", [64, 150])
def test_fla_gated_delta_rule(T: int) -> None:
    peer = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    tensors = case("head", T)
    ours = run(delta_rule, tensors, scale=SCALE)

    def theirs(q, k, v, beta, g, *, scale, initial_state, **_):  # type: ignore[no-untyped-def]
        return peer.naive_chunk_gated_delta_rule(
            q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=True
        )

    def recurrent(q, k, v, beta, g, *, scale, initial_state, **_):  # type: ignore[no-untyped-def]
        return peer.naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, scale=scale, initial_state=initial_state, output_final_state=True
        )

    assert_close(run(theirs, tensors, scale=SCALE), ours, TOLERANCE)
    assert_close(run(recurrent, tensors, scale=SCALE), ours, TOLERANCE)


@pytest.mark.parametrize("groups", [1, 2])
def test_fla_kda(groups: int) -> None:
    peer = pytest.importorskip("fla.ops.kda.naive")
    tensors = case("channel", 128, groups)
    ours = run(delta_rule, tensors, scale=SCALE)
    with torch.no_grad():  # they write in place into what autograd would need
        detached = {k: v.detach().clone() for k, v in tensors.items()}
        main = [detached[name] for name in ("q", "k", "v", "g", "beta")]
        for function in (peer.naive_recurrent_kda, peer.naive_chunk_kda):
            o, state = function(*main, initial_state=detached["initial_state"], output_final_state=True)
            assert_close({"o": o, "state": state}, {k: ours[k] for k in ("o", "state")}, TOLERANCE)


def test_fla_delta_rule() -> None:
    peer = pytest.importorskip("fla.ops.delta_rule.naive")
    tensors = case("none", 128)
    del tensors["initial_state"]  # their chunked form starts from zero

    def theirs(q, k, v, beta, g, **_):  # type: ignore[no-untyped-def]
        o, state = peer.delta_rule_chunkwise(*(x.transpose(1, 2) for x in (q, k, v, beta)))
        return o.transpose(1, 2), state

    assert_close(run(theirs, tensors), run(delta_rule_chunked, tensors, scale=SCALE), TOLERANCE)
