"""What operators keep: small runs tell it of larger ones, and the counter of live bytes counts what is alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import delta_rule, gated_linear_attention, selective_scan, short_convolution
from pretrain.estimate.kept import HEADS, TOKENS, Grows, Like, _Call, _ran
from pretrain.estimate.memory import Memory

B, F = torch.bfloat16, torch.float32
CALLS: dict[str, tuple[Any, tuple[Like | None, ...], dict[str, Any]]] = {
    "gated delta rule": (
        delta_rule,
        (Like((1, 0, 1, 64), B), Like((1, 0, 1, 64), B), Like((1, 0, 2, 64), B), Like((1, 0, 2), F), Like((1, 0, 2), F)),
        {"normalize_qk": True},
    ),
    "gated linear attention": (
        gated_linear_attention,
        (Like((1, 0, 1, 64), B), Like((1, 0, 1, 64), B), Like((1, 0, 1, 64), B), Like((1, 0, 1, 64), F)),
        {},
    ),
    "views of one projection": (
        gated_linear_attention,
        (Like((1, 0, 1, 32), B, False), Like((1, 0, 1, 32), B, False), Like((1, 0, 2, 32), B, False), Like((1, 0, 2), F)),
        {},
    ),
    "selective scan": (
        selective_scan,
        (Like((1, 0, 1), B), Like((1, 0, 1), F), Like((1, 8), F), Like((1, 0, 8), B), Like((1, 0, 8), B), Like((1,), F)),
        {},
    ),
    "short convolution": (
        short_convolution, (Like((1, 0, 1), B), Like((1, 4), F), None), {"activation": "silu"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_small_runs_tell_of_larger_ones(name: str) -> None:
    """Of the forms for GPUs, without one."""
    operator, likes, options = CALLS[name]
    call = _Call(operator, likes, HEADS[operator][: len(likes)], tuple(options.items()), True)
    runs = [_ran(call, tokens, few) for tokens in (TOKENS, 2 * TOKENS) for few in (1, 2)]
    large = _ran(call, 4 * TOKENS, 3)
    assert len({run.inputs for run in (*runs, large)}) == 1
    assert any(large.inputs) != (name == "views of one projection")  # which are copied
    assert Grows.through(*(run.extra for run in runs))(4 * TOKENS, 3) == pytest.approx(large.extra, rel=0.01, abs=512)


def test_live_bytes() -> None:
    with Memory() as memory:
        a = torch.zeros(100)
        view = a[:50]
        assert memory.live == 400
        b = a * 2
        assert (memory.live, memory.peak) == (800, 800)
        del a, b
        assert (memory.live, memory.peak) == (400, 800)  # the view keeps the whole
        del view
        with memory.paused():
            unseen = torch.zeros(1000)
        memory.begin()
        torch.zeros(10).sum()
        assert (memory.live, memory.peak) == (0, 44)
        memory.ignore([kept := torch.zeros(10)])
        assert memory.live == 0 and kept.numel() + unseen.numel() == 1010
