"""The lm-evaluation-harness adapter: the log-probabilities are the model's own; and, where it is installed, its own tasks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.evaluate import subject as subjects
from pretrain.evaluate.harness import Adapter, cut, evaluate
from pretrain.evaluate.subject import Subject, score_continuations
from pretrain.evaluate.tasks import check_names
from pretrain.exit import Exit
from pretrain.generate import generate
from pretrain.loading import load

TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    model, tokenizer = load(run)
    return Subject(model, tokenizer, context=64, batch=3)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def direct(subject: Subject, ids: Sequence[int], scored: int) -> float:
    """Log-probability of the last `scored` of these ids, one full forward pass for each."""
    total = 0.0
    for end in range(len(ids) - scored, len(ids)):
        with torch.no_grad():
            row = subject.model(torch.tensor([list(ids[:end])]))[0, -1].double().log_softmax(dim=-1)
        total += float(row[ids[end]])
    return total


PAIRS = [
    ("import ", "torch"),
    ("", "def f(x):\n"),
    ("class A:\n    ", "pass"),
    ("x", " = 1"),
    ("import ", "os"),
    ("y" * 40, "z"),
]


def test_loglikelihood_is_the_direct_log_probability(subject: Subject) -> None:
    encode, bos = subject.tokenizer.encode, subject.tokenizer.bos
    done: list[int] = []
    found = Adapter(subject, done.append).loglikelihood(requests(*PAIRS))
    for (context, continuation), (value, _) in zip(PAIRS, found):
        whole = encode(context + continuation)
        scored = len(whole) - len(encode(context.rstrip()))
        assert value == pytest.approx(direct(subject, [bos, *whole], scored), rel=1e-5), context
    assert done == [3, 3]


def test_greedy_is_what_decoding_writes(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    prompt = tokenizer.encode("def f")
    (written,) = generate(subject.model, [tokenizer.bos, *prompt], tokens=3, temperature=0.0, vocabulary=512)
    other = [*written[:2], (written[2] + 1) % 512]
    pairs = [([tokenizer.bos, *prompt], written), ([tokenizer.bos, *prompt], other)]
    assert [score.greedy for score in score_continuations(subject, pairs)] == [True, False]


def test_a_long_context_loses_its_beginning(subject: Subject) -> None:
    (found,) = Adapter(subject).loglikelihood(requests(("import torch\n" * 40, "import os")))
    whole = subject.tokenizer.encode("import torch\n" * 40 + "import os")
    scored = len(whole) - len(subject.tokenizer.encode(("import torch\n" * 40).rstrip()))
    assert len(whole) > 100
    assert found[0] == pytest.approx(direct(subject, whole[-65:], scored), rel=1e-5)
    with pytest.raises(ValueError, match="use --context"):
        Adapter(subject).loglikelihood(requests(("", "import torch\n" * 40)))


def test_rows_whose_logits_are_too_large_are_scored_through_the_cache(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Adapter(subject).loglikelihood(requests(*PAIRS))
    monkeypatch.setattr(subjects, "LOGIT_BYTES", 1)
    monkeypatch.setattr(Subject, "logits", None)
    found = Adapter(subject).loglikelihood(requests(*PAIRS))
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-5)
    assert [g for _, g in found] == [g for _, g in expected]


def test_rolling_scores_each_token_once_with_the_windows_of_the_harness(subject: Subject) -> None:
    text = "import torch\nfrom torch import nn\n" * 12
    ids = [subject.tokenizer.bos, *subject.tokenizer.encode(text)]
    n = len(ids) - 1
    assert n > 2 * 64 and n % 64
    expected = 0.0
    for done in range(0, n, 64):
        end = min(done + 64, n)
        expected += direct(subject, ids[max(0, end - 64) : end + 1], end - done)
    short = direct(subject, [ids[0], *subject.tokenizer.encode("x = 1")], len(subject.tokenizer.encode("x = 1")))
    found = Adapter(subject).loglikelihood_rolling(requests((text,), ("x = 1",), ("",)))
    assert found == [pytest.approx(expected, rel=1e-5), pytest.approx(short, rel=1e-5), 0.0]


def test_generation_stops_before_the_stop_string(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    (ids,) = generate(
        subject.model, [tokenizer.bos, *tokenizer.encode("def f")], tokens=12, temperature=0.0, vocabulary=512
    )
    whole = tokenizer.decode(ids)
    assert len(whole) >= 12
    stop = whole[5:7]
    options = [
        {"max_gen_toks": 12},
        {"max_gen_toks": 12, "until": [stop, "never seen"]},
        {"max_gen_toks": 3, "until": "\0"},
    ]
    found = Adapter(subject).generate_until(requests(*(("def f", each) for each in options)))
    assert found == [whole, whole[: whole.index(stop)], tokenizer.decode(ids[:3])]
    assert cut("a b c", ["c", " b"]) == "a" and cut("a b c", ["d", ""]) is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed here")
def test_a_missing_harness_says_how_to_get_it(subject: Subject) -> None:
    for attempt in (lambda: check_names(["lm_eval:piqa"]), lambda: evaluate(subject, ["piqa"])):
        with pytest.raises(Exit, match="pip install lm-eval") as error:
            attempt()
        assert error.value.exit_code == 2


def test_tasks_of_the_harness_itself(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for file in TASKS.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text().replace("SMALL_JSONL", str(TASKS / "small.jsonl")))
    names = ["braid_small_choice", "braid_small_rolling", "braid_small_generate"]
    found = evaluate(subject, names, folder=str(tmp_path))
    rows = [("import os, ", ("sys", "def"), 0), ("for x in", ("\n\n", " range"), 1), ("return ", ("None", "import"), 0)]
    adapter = Adapter(subject)
    right = 0
    for question, choices, label in rows:
        values = [value for value, _ in adapter.loglikelihood(requests(*((question, choice) for choice in choices)))]
        right += max(range(2), key=values.__getitem__) == label
    assert found["braid_small_choice"]["acc,none"] == pytest.approx(right / 3)
    nats = -sum(adapter.loglikelihood_rolling(requests(*((question,) for question, _, _ in rows))))
    size = sum(len(question.encode()) for question, _, _ in rows)
    assert found["braid_small_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    written = adapter.generate_until(requests(*((q, {"until": ["\n"], "max_gen_toks": 8}) for q, _, _ in rows)))
    exact = sum(text == choices[label] for text, (_, choices, label) in zip(written, rows)) / 3
    assert found["braid_small_generate"]["exact_match,none"] == pytest.approx(exact)
    with pytest.raises(ValueError, match="did you mean 'braid_small_choice'"):
        evaluate(subject, ["braid_smal_choice"], folder=str(tmp_path))
