"""Where the needle lies, how long the prompt is, and what perfect recall and none score."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.evaluate.needle import draw, grid, hide, synthetic
from pretrain.evaluate.subject import Subject, judge
from pretrain.loading import load


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    model, tokenizer = load(run)
    return Subject(model, tokenizer, 128)


@pytest.fixture(scope="module")
def hay(subject: Subject) -> list[int]:
    return subject.tokenizer.encode(synthetic(0))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [120, 333])
def test_placement(subject: Subject, hay: list[int], length: int, depth: float) -> None:
    tokenizer = subject.tokenizer
    found = hide(tokenizer, hay, length, depth, random.Random(3))
    assert len(found.prompt) + len(found.answer) == length
    assert found.prompt[0] == tokenizer.bos
    text, answer = tokenizer.decode(found.prompt[1:]), tokenizer.decode(found.answer)
    assert text.count(f" is{answer}.\n") == 1 and answer.strip().isdigit()
    question = text[text.rindex("\nThe secret number of ") :]
    assert question.endswith(" is") and text.count(question) == 2
    before = tokenizer.decode(found.prompt[1 : found.place])
    assert text.startswith(before + question)
    # Without fact and question: uninterrupted filler, of which the share `depth` lies before the fact.
    fact = len(tokenizer.encode(question)) + len(found.answer) + len(tokenizer.encode(".\n"))
    filler = length - 1 - fact - len(tokenizer.encode(question)) - len(found.answer)
    assert found.place - 1 == round(depth * filler)
    rest = found.prompt[1 : found.place] + found.prompt[found.place + fact : 1 + filler + fact]
    assert len(rest) == filler
    doubled = hay * (2 + filler // len(hay))
    assert any(doubled[i : i + filler] == rest for i in range(len(hay)))


def test_the_same_needle_at_every_length_and_a_short_haystack_is_repeated(subject: Subject, hay: list[int]) -> None:
    short = hide(subject.tokenizer, hay[:7], 150, 0.5, random.Random(1))
    long = hide(subject.tokenizer, hay, 300, 0.1, random.Random(1))
    assert short.answer == long.answer
    assert hide(subject.tokenizer, hay, 150, 0.5, random.Random(2)).answer != short.answer


def test_too_short_a_length_says_the_least(subject: Subject, hay: list[int]) -> None:
    with pytest.raises(ValueError, match="a needle needs") as error:
        hide(subject.tokenizer, hay, 10, 0.5, random.Random(0))
    least = int(str(error.value).split()[3])
    assert len(hide(subject.tokenizer, hay, least, 0.5, random.Random(0)).prompt) < least


def copies(tokenizer: Tokenizer) -> Any:
    """The logits of a model that goes on as the text did after the last occurrence of the ids so far."""

    def logits(self: Subject, context: list[int], continuation: list[int]) -> Tensor:
        out = torch.zeros(len(continuation), 512)
        for place in range(len(continuation)):
            ids = [*context, *continuation[:place]]
            tail = ids[-8:]
            at = next(i for i in range(len(ids) - 9, -1, -1) if ids[i : i + 8] == tail)
            out[place, ids[at + 8]] = 40.0
        return out

    return logits


def test_perfect_recall_scores_one_everywhere(
    subject: Subject, hay: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Subject, "continuation_logits", copies(subject.tokenizer))
    found = grid(subject, hay, [120, 128], [0.0, 0.5, 1.0], samples=2, seed=0)
    assert found["exact_match"] == [[1.0, 1.0]] * 3 and found["mean_exact_match"] == 1.0
    assert found["mean_log_probability"] == pytest.approx(0.0, abs=1e-6)
    draw(found, "a model", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_score_is_that_of_the_full_forward_and_of_greedy_decoding(subject: Subject, hay: list[int]) -> None:
    needle = hide(subject.tokenizer, hay, 128, 0.5, random.Random(0))
    row = torch.tensor([[*needle.prompt, *needle.answer]])
    with torch.no_grad():
        logits = subject.model(row)[0, len(needle.prompt) - 1 : -1]
    direct = logits.log_softmax(dim=-1).gather(-1, torch.tensor(needle.answer)[:, None]).sum().item()
    found = judge(subject.continuation_logits(needle.prompt, needle.answer), torch.tensor(needle.answer))
    assert found.log_probability == pytest.approx(direct, rel=1e-5)
    result = grid(subject, hay, [128], [0.5], samples=1, seed=0)
    assert result["log_probability"] == [[pytest.approx(direct / len(needle.answer), rel=1e-5)]]
    assert result["exact_match"] == [[float(found.greedy)]] == [[0.0]]
