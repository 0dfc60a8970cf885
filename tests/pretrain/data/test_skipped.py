"""Spans of the order that a run leaves out: the same sequences for any number of ranks, after any restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data import Corpus, Loader
from pretrain.data.order import joined, past

T = 32


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus.open(prepared)


def loader(corpus: Corpus, **changes: Any) -> Loader:
    given: dict[str, Any] = {"sequence_length": T, "global_batch": 4, "micro_batch": 1, "seed": 5, **changes}
    return Loader(corpus, **given)


def test_numbers_past_spans() -> None:
    assert [past([], n) for n in range(3)] == [0, 1, 2]
    assert [past([(2, 4), (5, 6)], n) for n in range(6)] == [0, 1, 4, 6, 7, 8]
    assert [past([(2, 4), (4, 6)], n) for n in range(4)] == [0, 1, 6, 7]
    assert past([(0, 3)], -1) == -1  # before the first


def test_spans_are_joined() -> None:
    assert joined([], 3, 5) == [(3, 5)]
    assert joined([(1, 2)], 3, 5) == [(1, 2), (3, 5)]
    assert joined([(1, 3), (8, 9)], 3, 5) == [(1, 5), (8, 9)]
    assert joined([(4, 6), (8, 9)], 2, 8) == [(2, 9)]


def test_what_is_skipped_is_seen_by_no_rank_and_the_rest_by_one(corpus: Corpus) -> None:
    """Two rollbacks, the second over the first: sequences 4 to 11 go, then 8 used ones from 2 on."""
    plain = loader(corpus, global_batch=1)
    sequences = [plain.batches(i)[0].tokens for i in range(40)]
    for ranks in (1, 2, 4):
        parts = [loader(corpus, rank=rank, ranks=ranks, prefetch=ranks == 2) for rank in range(ranks)]
        for part in parts:
            part.batches(0), part.batches(1), part.batches(2)
            assert part.position(3) == {(0, 0): 12}
            part.load_state_dict({**part.state_dict(), "step": 1, "sequences": 4})
            part.skip_to({(0, 0): 12})
            assert part.skipped == [[4, 12]] and part.position(1) == {(0, 0): 4} and part.position(2) == {(0, 0): 16}
            part.batches(1), part.batches(2)
            part.load_state_dict({**part.state_dict(), "step": 0, "sequences": 0, "skipped": []})
            part.skip_to({(0, 0): 20})
            assert part.skipped == [[0, 20]]
        used = []
        for step in (0, 1):
            for micro in range(4 // ranks):
                used += [part.batches(step)[micro].tokens for part in parts]
        assert all(torch.equal(a, b) for a, b in zip(used, sequences[20:28], strict=True))
        state = parts[0].state_dict()
        assert state["skipped"] == [[0, 20]] and state["sequences"] == 8
        again = loader(corpus, global_batch=8, micro_batch=2)  # the rest of the run, in steps of another size
        again.load_state_dict(state)
        tokens = torch.cat([batch.tokens.view(-1, T) for batch in again.batches(state["step"])])
        assert torch.equal(tokens, torch.cat(sequences[28:36]))
        for part in parts:
            part.close()


def test_a_state_from_before_spans_were_known_has_none(corpus: Corpus) -> None:
    fresh = loader(corpus)
    fresh.skip_to({(0, 0): 3})
    state = {key: value for key, value in fresh.state_dict().items() if key != "skipped"}
    fresh.load_state_dict(state)
    assert fresh.skipped == []
