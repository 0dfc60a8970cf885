"""Strided windows: each token once, with the context promised; perplexity equals the direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from parallel.processes import Processes
from pretrain.evaluate.perplexity import loss_of, score
from pretrain.evaluate.windows import batches, cost, windows
from tests.pretrain.small import decoder, tokens

ALONE = Processes(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("targets", [0, 1, 7, 8, 9, 20, 61])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (100, 50)])
def test_every_target_counts_once_and_sees_its_context(targets: int, context: int, stride: int) -> None:
    counted = []
    for window in windows(targets, context, stride):
        assert 0 <= window.start <= window.scored < window.end <= targets
        assert window.end - window.start <= context
        for target in range(window.scored + 1, window.end + 1):
            seen = target - window.start
            assert seen >= min(target, context - stride + 1 if window.scored else 1)
            counted.append(target)
    assert counted == list(range(1, targets + 1))


def test_windows_by_hand() -> None:
    assert [tuple(w) for w in windows(10, 4, 4)] == [(0, 4, 0), (4, 8, 4), (6, 10, 8)]
    assert [tuple(w) for w in windows(7, 4, 2)] == [(0, 4, 0), (2, 6, 4), (3, 7, 6)]
    assert cost(7, 4, 2) == 12


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the context of 8"):
        list(windows(10, 8, stride))


def test_batches_hold_every_target_once_and_are_bounded() -> None:
    documents = [np.arange(n) + 1000 * i for i, n in enumerate([1, 2, 30, 5, 17])]
    found: list[int] = []
    for batch in batches(documents, 8, 4, rows=3):
        assert batch.tokens.shape == batch.targets.shape and batch.tokens.shape[1] <= 24
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.tokens.shape[1]
        scored = batch.targets != -100
        assert torch.equal(batch.targets[scored], batch.tokens[scored] + 1)
        found += batch.targets[scored].tolist()
    assert sorted(found) == sorted(int(t) for document in documents for t in document[1:])


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (12, 12), (12, 5), (12, 1)])
def test_the_loss_is_the_direct_computation(context: int, stride: int) -> None:
    model = decoder(layers=["gdn + moe", "attention + swiglu"]).double().eval()
    documents = [tokens(n, seed=n).numpy() for n in (40, 13, 2)]
    byte_table = torch.arange(64) % 5
    nats, count, size = 0.0, 0, 0
    for document in documents:
        ids = torch.from_numpy(document)
        for target in range(1, len(ids)):
            # The window that scores it: the first context targets together, then strides.
            past = target if target <= context else min(context, context - stride + 1 + (target - context - 1) % stride)
            if target > context:
                end = min(context + -(-(target - context) // stride) * stride, len(ids) - 1)
                past = target - max(0, end - context)
            with torch.no_grad():
                row = model(ids[None, target - past : target])[0, -1].double().log_softmax(dim=-1)
            nats -= float(row[ids[target]])
            count += 1
            size += int(byte_table[ids[target]])
    found = score(loss_of(model), model, batches(documents, context, stride, rows=4), byte_table, ALONE, "fp32")
    assert found["scored_tokens"] == count == 52
    assert found["scored_bytes"] == size
    assert found["validation_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_uniform_model_by_hand() -> None:
    """64 tokens, all as likely: 6 bits a token; with 2 bytes a token, 3 bits per byte."""
    model = decoder(init_std=1e-12)
    found = score(loss_of(model), model, batches([tokens(50).numpy()], 16, 8, 2), torch.full((64,), 2), ALONE, "fp32")
    assert found["validation_loss"] == pytest.approx(math.log(64), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(3.0, rel=1e-6)
    assert (found["scored_tokens"], found["scored_bytes"]) == (49, 98)
