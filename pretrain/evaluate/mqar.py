"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927).

A sequence gives n key-value pairs, then asks for keys among filler; at each asked key the model must predict its value:

    k1 v1 k2 v2 ... kn vn | . . k2 . . . k1 . k5 ...        targets: v2 at k2, v1 at k1, ...

What separates mixers is how many pairs their state can hold. The distance from the end of the pairs to a query follows a power
law, as in text, where most repetitions are near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batch import IGNORE
from pretrain.evaluate.subject import Subject

POWER = 0.01  # Zoology's exponent: density of the gap x proportional to x ** (POWER - 1)
BLANK = 0


def halves(vocabulary: int) -> int:
    """How many keys there are, and how many values: keys are 1 .. K, values K + 1 .. 2 K, 0 is blank."""
    return (vocabulary - 1) // 2


def examples(
    n_pairs: int,
    batch: int,
    length: int,
    vocabulary: int,
    generator: torch.Generator,
    *,
    power: float = POWER,
    noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """(tokens, targets), both int64 [batch, length] on the CPU; targets are -100 wherever nothing is asked.

    A row's keys are distinct, and so are its values. Each key is asked once, at an even place after the pairs. noise: what stands
    between the queries is random (values, and keys that the row does not use) and not blank. Raises ValueError when length is
    below 4 n_pairs or the vocabulary has fewer keys than pairs.
    """
    keys = halves(vocabulary)
    if n_pairs < 1 or n_pairs > keys:
        raise ValueError(f"{n_pairs} pairs from a vocabulary of {vocabulary}, which has {keys} keys; use 1 to {keys}")
    places = (length - 2 * n_pairs) // 2
    if places < n_pairs:
        raise ValueError(f"{n_pairs} pairs and their queries need a length of {4 * n_pairs}, not {length}")
    order = torch.rand(batch, keys, generator=generator).argsort(dim=-1) + 1
    asked, unused = order[:, :n_pairs], order[:, n_pairs:]
    values = torch.rand(batch, keys, generator=generator).argsort(dim=-1)[:, :n_pairs] + 1 + keys

    density = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1.0)
    gaps = torch.multinomial(density.expand(batch, -1), n_pairs, replacement=False, generator=generator)
    where = 2 * n_pairs + 2 * gaps

    if noise:
        pool = torch.cat((unused, torch.arange(keys + 1, 2 * keys + 1).expand(batch, -1)), dim=1)
        tokens = pool.gather(1, torch.randint(pool.shape[1], (batch, length), generator=generator))
    else:
        tokens = torch.full((batch, length), BLANK)
    tokens[:, 0 : 2 * n_pairs : 2], tokens[:, 1 : 2 * n_pairs : 2] = asked, values
    tokens.scatter_(1, where, asked)
    targets = torch.full((batch, length), IGNORE).scatter_(1, where, values)
    return tokens, targets


@dataclass
class Recall:
    """Sums over queries. correct: the value is the likeliest of all tokens; among: of the values of its own row."""

    queries: int = 0
    correct: int = 0
    among: int = 0
    nats: float = 0.0

    def add(self, logits: Tensor, targets: Tensor, candidates: Tensor) -> None:
        """logits [B, T, V], targets int64 [B, T], candidates int64 [B, n]: the values of each row."""
        rows, places = (targets != IGNORE).nonzero(as_tuple=True)
        at, right = logits[rows, places], targets[rows, places]
        own = candidates[rows]
        chosen = own.gather(1, at.gather(1, own).argmax(dim=1, keepdim=True))[:, 0]
        self.queries += len(rows)
        self.correct += int((at.argmax(dim=-1) == right).sum())
        self.among += int((chosen == right).sum())
        self.nats -= float(at.log_softmax(dim=-1).gather(1, right[:, None]).double().sum())

    def summary(self) -> dict[str, float]:
        return {
            "accuracy": self.correct / self.queries,
            "accuracy_among_values": self.among / self.queries,
            "nats_per_value": self.nats / self.queries,
            "queries": self.queries,
        }


def recall(
    subject: Subject,
    n_pairs: int,
    count: int,
    length: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Recall of a trained language model from context alone, over `count` rows of `length` tokens.

    Keys, values and noise are random text tokens of its tokenizer (another random split of the vocabulary for each row), after
    the token that begins a document. accuracy counts the likeliest of all tokens; accuracy_among_values the likeliest of the
    row's n values, of which a model without recall gets 1 / n.
    """
    text = torch.from_numpy(subject.tokenizer.token_bytes).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    result = Recall()
    for start in range(0, count, subject.batch):
        rows = min(subject.batch, count - start)
        tokens, targets = examples(n_pairs, rows, length - 1, len(text) + 1, generator, noise=True)
        names = text[torch.rand(rows, len(text), generator=generator).argsort(dim=-1)]
        tokens = names.gather(1, tokens - 1)  # with noise, nothing is blank
        targets = torch.where(targets == IGNORE, IGNORE, names.gather(1, targets.clamp(min=1) - 1))
        first = torch.full((rows, 1), subject.tokenizer.bos)
        logits = subject.logits(torch.cat((first, tokens), dim=1))[:, 1:].cpu()
        result.add(logits, targets, tokens[:, 1 : 2 * n_pairs : 2])
        advance(rows)
    return result.summary()
