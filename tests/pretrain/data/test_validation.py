from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.data import Corpus, ValidationSet
from tests.pretrain.data.test_store import write_megatron


@pytest.fixture(scope="module")
def corpus(prepared: Path) -> Corpus:
    return Corpus.open(prepared, "validation")


@pytest.mark.parametrize(
    ("length", "micro_batch", "ranks"), [(64, 4, 1), (64, 3, 2), (100, 1, 4), (10**6, 1, 2), (1, 512, 1)]
)
def test_every_byte_is_scored_once(prepared: Path, corpus: Corpus, length: int, micro_batch: int, ranks: int) -> None:
    assert corpus.token_bytes is not None
    found = scored = 0
    for rank in range(ranks):
        part = ValidationSet(corpus, length, micro_batch, rank, ranks)
        batches = list(part)
        assert len(batches) == len(part)
        assert all(batch.tokens.shape == (1, length * micro_batch) for batch in batches)
        found += sum(batch.bytes_scored(corpus.token_bytes) for batch in batches)
        scored += sum(batch.scored for batch in batches)
    assert found == (prepared / "validation_text.bin").stat().st_size
    assert scored == corpus.tokens - corpus.documents  # all but bos


def test_the_text_file_is_the_documents(prepared: Path, corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    text = "".join(tokenizer.decode(corpus.read(i).tolist()) for i in range(corpus.documents))
    assert text.encode() == (prepared / "validation_text.bin").read_bytes()


def test_ranks_share_the_windows_in_order(corpus: Corpus) -> None:
    alone = [row for batch in ValidationSet(corpus, 64, 2) for row in batch.tokens.view(-1, 64)]
    parts = [list(ValidationSet(corpus, 64, 2, rank, 3)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    together = [row for m in range(len(parts[0])) for part in parts for row in part[m].tokens.view(-1, 64)]
    assert torch.equal(torch.stack(together[: len(alone)]), torch.stack(alone))
    # What fills up the last batches has no target and its own border.
    filled = [row for part in parts for batch in part for row in batch.targets.view(-1, 64)]
    assert sum(bool((row == -100).all()) for row in filled) == len(together) - -(-(corpus.tokens - 1) // 64)


def test_the_same_batches_each_time(corpus: Corpus) -> None:
    fixed = ValidationSet(corpus, 64, 4)
    for a, b in zip(list(fixed), list(fixed)):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)


def test_a_short_last_window_by_hand(tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", [[[10, 11, 12]], [[20, 21, 22, 23]]])
    (batch,) = ValidationSet(Corpus.open(tmp_path / "pair"), 4, 2)
    x = -100
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, x, 21, 22, 23, x, x]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert batch.bytes_scored(torch.arange(30)) == 11 + 12 + 21 + 22 + 23


def test_a_short_last_window_that_ends_at_a_border_by_hand(tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", [[[10, 11, 12]], [[20]]])
    (batch,) = ValidationSet(Corpus.open(tmp_path / "pair"), 5, 1)
    assert batch.tokens.tolist() == [[10, 11, 12, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, -100, -100, -100]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]


def test_an_empty_window_by_hand(tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", [[[10, 11, 12]]])
    batches = [next(iter(ValidationSet(Corpus.open(tmp_path / "pair"), 2, 1, rank, 2))) for rank in range(2)]
    assert batches[0].targets.tolist() == [[11, 12]]
    assert batches[1].targets.tolist() == [[-100, -100]]
    assert batches[1].cu_seqlens.tolist() == [0, 2]


def test_limit_takes_windows_from_all_of_the_split(corpus: Corpus) -> None:
    whole, part = ValidationSet(corpus, 64, 1), ValidationSet(corpus, 64, 1, limit=5)
    windows = len(whole.windows)
    assert part.windows.tolist() == [k * windows // 5 for k in range(5)]
    everything = list(whole)
    for window, batch in zip(part.windows, part):
        assert torch.equal(batch.tokens, everything[window].tokens)
    assert len(ValidationSet(corpus, 64, 1, limit=10**9)) == len(whole)


def test_bad_arguments(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit must be at least 1"):
        ValidationSet(corpus, 64, 1, limit=0)
    with pytest.raises(ValueError, match="below ranks"):
        ValidationSet(corpus, 64, 1, rank=2, ranks=2)
    write_megatron(tmp_path / "one", [[[7]]])
    with pytest.raises(ValueError, match="nothing to predict"):
        ValidationSet(Corpus.open(tmp_path / "one"), 64, 1)
