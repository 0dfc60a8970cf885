"""The MQAR generator's properties, and what perfect, absent and partial recall score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.evaluate.mqar import Recall, examples, halves, recall
from pretrain.evaluate.subject import Subject
from pretrain.loading import load


def draw(
    n: int, batch: int = 32, length: int = 96, vocabulary: int = 65, seed: int = 0, **options
) -> tuple[Tensor, Tensor]:
    return examples(n, batch, length, vocabulary, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("n", [1, 5, 24])
def test_rows_are_what_the_definition_says(n: int, noise: bool) -> None:
    tokens, targets = draw(n, noise=noise)
    keys = halves(65)
    assert keys == 32 and tokens.shape == targets.shape == (32, 96) and tokens.dtype == targets.dtype == torch.int64
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        given = dict(zip(row[0 : 2 * n : 2], row[1 : 2 * n : 2]))
        assert len(given) == n == len(set(given.values()))
        assert all(1 <= key <= keys for key in given) and all(keys < value <= 2 * keys for value in given.values())
        asked = [place for place, value in enumerate(wanted) if value != -100]
        assert sorted(row[place] for place in asked) == sorted(given)
        assert all(place >= 2 * n and place % 2 == 0 and wanted[place] == given[row[place]] for place in asked)
        rest = [row[place] for place in range(2 * n, 96) if place not in asked]
        if noise:  # a key that was given never stands where nothing is asked
            assert 0 not in rest and not set(rest) & set(given) and max(rest) <= 2 * keys
        else:
            assert set(rest) <= {0}


def test_seed_decides_and_rows_differ() -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw(4), draw(4)))
    assert not torch.equal(draw(4)[0], draw(4, seed=1)[0])
    assert len({tuple(row) for row in draw(4)[0].tolist()}) == 32


def test_gaps_follow_the_power_law() -> None:
    """One query: its gap x has probability proportional to x ** (power - 1)."""
    _, targets = draw(1, batch=20000, length=66, power=0.5)
    gaps = (targets != -100).nonzero()[:, 1].sub(2).div(2).long()
    expected = torch.arange(1, 33, dtype=torch.float64) ** -0.5
    expected /= expected.sum()
    assert (
        torch.bincount(gaps, minlength=32) / 20000 - expected
    ).abs().max() < 0.012  # 4 standard deviations of the largest
    even = (draw(1, batch=20000, length=66, power=1.0)[1] != -100).nonzero()[:, 1]
    assert torch.bincount(even)[2::2].sub(625).abs().max() < 110


def test_what_does_not_fit_is_refused() -> None:
    assert draw(24, length=96)[0].shape == (32, 96)
    with pytest.raises(ValueError, match="need a length of 100, not 96"):
        draw(25)
    with pytest.raises(ValueError, match="which has 32 keys"):
        draw(33, length=1000)


def oracle(tokens: Tensor, vocabulary: int) -> Tensor:
    """Logits of a model with perfect recall: after a token, what followed it first."""
    logits = torch.zeros(*tokens.shape, vocabulary)
    for row, ids in enumerate(tokens.tolist()):
        for place, token in enumerate(ids):
            first = ids.index(token)
            if first < place:
                logits[row, place, ids[first + 1]] = 50.0
    return logits


def test_perfect_recall_is_100_percent_and_none_is_chance() -> None:
    n, rows = 8, 500
    tokens, targets = draw(n, batch=rows, noise=True)
    values = tokens[:, 1 : 2 * n : 2]
    perfect, chance = Recall(), Recall()
    perfect.add(oracle(tokens, 65), targets, values)
    chance.add(torch.randn(rows, 96, 65, generator=torch.Generator().manual_seed(5)), targets, values)
    assert (perfect.queries, perfect.correct, perfect.among) == (4000, 4000, 4000)
    assert perfect.summary()["accuracy"] == 1.0 and perfect.summary()["nats_per_value"] == pytest.approx(0.0, abs=1e-9)
    assert chance.summary()["accuracy"] == pytest.approx(1 / 65, abs=0.008)
    assert chance.summary()["accuracy_among_values"] == pytest.approx(1 / n, abs=0.02)


def test_sums_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.26, 0.24]]]))
    found = Recall()
    found.add(logits, torch.tensor([[-100, 2]]), torch.tensor([[2, 3]]))
    found.add(
        logits, torch.tensor([[2, -100]]), torch.tensor([[2, 1]])
    )  # not the likeliest of all, but of the row's values
    assert (found.queries, found.correct, found.among) == (2, 1, 2)
    assert found.nats == pytest.approx(-torch.log(torch.tensor([0.26, 0.3])).sum().item(), rel=1e-5)


def test_a_checkpoint_is_asked_about_text_tokens_after_bos(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(run)
    seen: list[Tensor] = []

    def perfect(self: Subject, tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return oracle(tokens, 512)

    monkeypatch.setattr(Subject, "logits", perfect)
    found = recall(Subject(model, tokenizer, 64, batch=3), 6, count=7, length=64, seed=0)
    assert found["accuracy"] == found["accuracy_among_values"] == 1.0 and found["queries"] == 42
    assert [len(rows) for rows in seen] == [3, 3, 1]
    for rows in seen:
        assert rows.shape[1] == 64 and (rows[:, 0] == tokenizer.bos).all()
        assert (torch.from_numpy(tokenizer.token_bytes)[rows[:, 1:]] > 0).all()
    assert len(torch.cat(seen).unique()) > 150  # the split of the vocabulary is another one for each row


def test_an_untrained_model_recalls_by_chance(run: Path) -> None:
    model, tokenizer = load(run)
    found = recall(Subject(model, tokenizer, 64), 8, count=64, length=64, seed=1)
    assert found["accuracy_among_values"] == pytest.approx(1 / 8, abs=0.06)
    assert found["nats_per_value"] > 5.0
