from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data import Batch, Corpus, DataConfig, DataError, Loader
from tests.pretrain.data.test_store import patch, write_megatron

T = 32


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus.open(prepared)


def loader(corpus: Corpus, **changes: Any) -> Loader:
    given: dict[str, Any] = {"sequence_length": T, "global_batch": 16, "micro_batch": 2, "seed": 5, **changes}
    return Loader(corpus, **given)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.targets, y.targets)
        and torch.equal(x.cu_seqlens, y.cu_seqlens)
        for x, y in zip(a, b)
    )


def rows(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([torch.stack([b.tokens.view(-1, T), b.targets.view(-1, T)], 1) for b in batches])


def test_a_batch_by_hand(tmp_path: Path) -> None:
    # Three documents of 3, 1 and 6 tokens; the digits tell document and place.
    write_megatron(tmp_path / "pair", [[[10, 11, 12]], [[20]], [[30, 31, 32, 33, 34, 35]]])
    corpus = Corpus.open(tmp_path / "pair")
    hand = Loader(corpus, sequence_length=4, global_batch=2, micro_batch=2, seed=0)
    (batch,) = hand.batches(0)
    assert batch.tokens.shape == batch.targets.shape == (1, 8)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    ends = {12, 20, 35}
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    for token, target in zip(tokens, targets):
        assert target == (-100 if token in ends else token + 1)
    borders = {0, 4, 8} | {i for i, token in enumerate(tokens) if token % 10 == 0}
    assert batch.cu_seqlens.tolist() == sorted(borders)
    assert batch.scored == sum(target != -100 for target in targets)
    assert batch.longest == max(b - a for a, b in zip(sorted(borders), sorted(borders)[1:]))
    expected = [i - max(b for b in borders if b <= i) for i in range(8)]
    assert batch.positions().tolist() == [expected]


def test_all_ranks_together_read_one_stream(corpus: Corpus) -> None:
    alone = loader(corpus)
    last = alone.order.windows_per_epoch // 16  # the step across the epoch's border
    for step in (0, 1, last - 1, last, last + 1, 3):
        stream = rows(alone.batches(step))
        assert stream.shape == (16, 2, T)
        for ranks in (2, 4, 8):
            each = [loader(corpus, rank=r, ranks=ranks).batches(step) for r in range(ranks)]
            together = [each[r][m] for m in range(16 // ranks // 2) for r in range(ranks)]
            assert torch.equal(rows(together), stream)
    # The size of a micro-batch does not move anything either.
    assert torch.equal(rows(loader(corpus, micro_batch=8).batches(2)), rows(alone.batches(2)))


def test_an_epoch_covers_the_corpus(corpus: Corpus) -> None:
    one = loader(corpus, global_batch=1, micro_batch=1)
    windows = one.order.windows_per_epoch
    counts = np.zeros(512, np.int64)
    scored = masked = 0
    for step in range(windows):
        (batch,) = one.batches(step)
        kept = batch.targets[batch.targets >= 0]
        counts += np.bincount(kept.numpy(), minlength=512)
        scored, masked = scored + batch.scored, masked + T - batch.scored
    whole = np.bincount(np.concatenate([corpus.read(i) for i in range(corpus.documents)]), minlength=512)
    assert scored + masked == windows * T
    assert masked <= corpus.documents
    assert counts[1] == 0  # bos begins documents and is predicted by none
    missing = whole - counts
    missing[1] = 0
    assert (missing >= 0).all()
    assert missing.sum() < T  # the remainder of the stream


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_goes_on_with_the_same_batches(corpus: Corpus, prefetch: bool) -> None:
    whole = loader(corpus, prefetch=prefetch)
    border = whole.order.windows_per_epoch // 16
    expected = {step: whole.batches(step) for step in range(border + 3)}
    for stop in (1, border // 2, border, border + 1):
        first = loader(corpus, prefetch=prefetch)
        for step in range(stop):
            assert equal(first.batches(step), expected[step])
        state = first.state_dict()
        assert (state["step"], state["sequences"]) == (stop, stop * 16)
        second = loader(corpus, ranks=1, prefetch=prefetch)
        second.batches(0)  # something prefetched that must be dropped
        second.load_state_dict(state)
        assert second.state_dict() == state
        for step in range(stop, min(stop + 3, border + 3)):
            assert equal(second.batches(step), expected[step])
        first.close()
        second.close()
    whole.close()


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_with_another_global_batch_repeats_and_skips_nothing(corpus: Corpus, prefetch: bool) -> None:
    first = loader(corpus)
    for step in range(3):
        first.batches(step)
    second = loader(corpus, global_batch=8, prefetch=prefetch)
    second.batches(2)  # prefetches step 3, but from where step 3 was before the state came
    second.load_state_dict(first.state_dict())
    assert second.first_sequence(3) == 48
    assert torch.equal(rows(second.batches(3) + second.batches(4)), rows(first.batches(3)))
    assert second.state_dict()["sequences"] == 64
    with pytest.raises(ValueError, match="step -1"):
        second.batches(-1)
    second.close()


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("corpus", "0" * 32, "point `data.path`"),
        ("seed", 6, "set the data seed"),
        ("sequence_length", 64, "set `sequence_length`"),
        ("packing", "best_fit", "set `data.packing`"),
        ("order_version", 0, "use the release"),
    ],
)
def test_state_of_another_order_is_refused(corpus: Corpus, key: str, value: object, fix: str) -> None:
    one = loader(corpus)
    state = {**one.state_dict(), key: value, "step": 9}
    with pytest.raises(ValueError, match=f"the checkpoint has {key} .*{fix}"):
        one.load_state_dict(state)
    assert one.state_dict()["step"] == 0


def test_state_is_plain_and_the_same_on_all_ranks(corpus: Corpus) -> None:
    states = []
    for rank in range(2):
        one = loader(corpus, rank=rank, ranks=2)
        one.batches(0)
        states.append(one.state_dict())
    assert states[0] == states[1]
    assert json.loads(json.dumps(states[0])) == states[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 10, "ranks": 4},
            "does not divide by 4 data-parallel ranks x micro_batch 2 = 8: use global_batch 8 or 16",
        ),
        ({"global_batch": 1}, "use global_batch 2, or"),
        ({"global_batch": 0}, "must be at least 1"),
        ({"rank": 2, "ranks": 2}, "rank 2 is not one of 2"),
        ({"sequence_length": 10**9}, "lower sequence_length to at most"),
    ],
)
def test_sizes_that_do_not_fit(corpus: Corpus, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(corpus, **changes)


@pytest.mark.parametrize("prefetch", [False, True])
def test_damage_is_found_when_the_batch_is_read(copied: Path, prefetch: bool) -> None:
    size = (copied / "train.bin").stat().st_size
    patch(copied / "train.bin", size // 2 // 2 * 2, b"\xff\xff")
    one = Loader(Corpus.open(copied), sequence_length=T, global_batch=16, micro_batch=2, seed=0, prefetch=prefetch)
    with pytest.raises(DataError, match=f"token id 65535 at byte {size // 2 // 2 * 2} "):
        for step in range(int(one.steps_per_epoch) + 1):
            one.batches(step)
    one.close()


def test_prefetch_reads_ahead_on_one_thread_and_ends(corpus: Corpus) -> None:
    ahead, plain = loader(corpus, prefetch=True), loader(corpus)
    for step in (0, 1, 2, 7, 8, 3):  # in order, a jump, and back
        assert equal(ahead.batches(step), plain.batches(step))
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert equal(ahead.batches(4), plain.batches(4))


def test_config(tmp_path: Path) -> None:
    config = DataConfig(path=tmp_path, sequence_length=128)
    assert (config.seed, config.prefetch, config.validation_path, config.tokenizer) == (0, True, None, None)
    cases: list[dict[str, Any]] = [{"sequence_length": 0}, {"sequence_length": 8, "sequence_lenght": 1}]
    for bad in cases:
        with pytest.raises(ValueError, match="sequence_len"):
            DataConfig(path=tmp_path, **bad)
    assert DataConfig.model_fields["sequence_length"].description
