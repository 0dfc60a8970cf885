"""Needle in a haystack (Kamradt 2023): a fact at a known depth of a long text, asked for at its end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.data.tokenizer import Tokenizer
from pretrain.evaluate.subject import Subject, judge

NAMES = (
    "Accra", "Bergen", "Bogota", "Cairo", "Dakar", "Dublin", "Fargo", "Geneva", "Hanoi", "Havana", "Izmir", "Jakarta", "Kyoto",
    "Lagos", "Lima", "Lisbon", "Madrid", "Manila", "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Sofia", "Tunis", "Vienna",
)  # fmt: skip
SUBJECTS = (
    "The river",
    "A small boat",
    "The old clock",
    "Her garden",
    "The morning train",
    "A grey cat",
    "The market",
    "His coat",
)
VERBS = ("waits", "stays", "rests", "shines", "turns", "sleeps", "stands", "returns")
PLACES = ("by the bridge", "under the trees", "near the harbour", "in the rain", "behind the house", "on the hill")


@dataclass(frozen=True)
class Needle:
    """prompt: ids that end just before the answer; answer: the ids to write; place: where in the prompt the fact begins."""

    prompt: list[int]
    answer: list[int]
    place: int


def hide(tokenizer: Tokenizer, haystack: Sequence[int], length: int, depth: float, rng: random.Random) -> Needle:
    """A prompt that is `length` tokens long together with its answer, the fact after the share `depth` of its filler.

    haystack: ids, begun at a random place and repeated when it is too short. depth: 0 is the beginning of the text, 1 is right
    before the question. Raises ValueError when fact and question alone are longer than `length`.
    """
    name, number = rng.choice(NAMES), str(rng.randrange(1000, 10000))
    question = f"\nThe secret number of {name} is"
    asked, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {number}")
    # The pieces of the answer as they are in its sentence: the border may lie inside a piece.
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole)))
    asked, answer = whole[:shared], whole[shared:]
    fact = [*asked, *answer, *tokenizer.encode(".\n")]
    filler = length - 1 - len(fact) - len(asked) - len(answer)
    if filler < 0:
        raise ValueError(
            f"a needle needs {length - filler} tokens with this tokenizer, more than the length {length}; "
            "use longer --needle-lengths"
        )
    begin = rng.randrange(len(haystack))
    repeats = -(-(begin + filler) // len(haystack))
    hay = (list(haystack) * max(1, repeats))[begin : begin + filler] if filler else []
    place = round(depth * filler)
    prompt = [tokenizer.bos, *hay[:place], *fact, *hay[place:], *asked]
    return Needle(prompt, answer, 1 + place)


def synthetic(seed: int, sentences: int = 400) -> str:
    """Filler without numbers or names."""
    rng = random.Random(seed)
    lines = (f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(PLACES)}." for _ in range(sentences))
    return "\n".join(lines) + "\n"


def grid(
    subject: Subject,
    haystack: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """exact_match and log_probability, each [depths][lengths], means over `samples` needles.

    exact_match: share of answers that greedy decoding writes to the last token. log_probability: nats per token of the answer.
    advance: told how many prompt tokens more are done.
    """
    exact = [[0.0] * len(lengths) for _ in depths]
    likely = [[0.0] * len(lengths) for _ in depths]
    for (row, depth), (column, length) in itertools.product(enumerate(depths), enumerate(lengths)):
        for sample in range(samples):
            # The same questions at every length and depth, so that cells compare.
            needle = hide(subject.tokenizer, haystack, length, depth, random.Random(seed * 1_000_003 + sample))
            logits = subject.continuation_logits(needle.prompt, needle.answer)
            answer = torch.tensor(needle.answer, device=logits.device)
            found = judge(logits, answer, subject.tokenizer.vocabulary_size)
            exact[row][column] += found.greedy / samples
            likely[row][column] += found.log_probability / len(needle.answer) / samples
            advance(length)
    cells = len(lengths) * len(depths)
    return {
        "lengths": list(lengths),
        "depths": list(depths),
        "samples": samples,
        "exact_match": exact,
        "log_probability": likely,
        "mean_exact_match": sum(map(sum, exact)) / cells,
        "mean_log_probability": sum(map(sum, likely)) / cells,
    }


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    """The grid as two heat maps, lengths across and depths down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.0 + 1.2 * len(result["lengths"]), 1.8 + 0.5 * len(result["depths"]))
    figure, axes = pyplot.subplots(1, 2, figsize=size, layout="constrained", squeeze=False)
    panels = (
        ("exact_match", "answers written exactly", 0.0, 1.0),
        ("log_probability", "nats per answer token", None, 0.0),
    )
    for axis, (key, label, low, high) in zip(axes[0], panels):
        image = axis.imshow(result[key], vmin=low, vmax=high, cmap="viridis", aspect="auto")
        for row, values in enumerate(result[key]):
            for column, value in enumerate(values):
                dark = image.norm(value) < 0.6
                axis.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=8,
                )
        axis.set_xticks(range(len(result["lengths"])), [str(length) for length in result["lengths"]])
        axis.set_yticks(range(len(result["depths"])), [f"{depth:.0%}" for depth in result["depths"]])
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel("depth of the needle")
        axis.set_title(label, fontsize=10)
        figure.colorbar(image, ax=axis)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
