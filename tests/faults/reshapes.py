"""One trial: a run that changes its layout at every start must train like one rank that was never interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pretrain.config import ConfigError, RunConfig
from pretrain.equivalence.layouts import legal
from pretrain.train import layout
from tests.faults.kills import started_again
from tests.pretrain.train.small_run import configuration, losses, records
from tests.ranks import TRAINING, run_ranks

SETTINGS = ("train.precision=fp32", "train.steps=6", "checkpoint.every=2", "log.every=1")
STARTS = 3
LOSS = 2e-5  # of the loss: sums in another order, in fp32, over six steps
RANKS = (1, 2, 2, 4)


class Reshapes:
    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder, corpus
        self.number = 0
        alone = folder / "alone"
        assert run_ranks(started_again, 1, alone, corpus, SETTINGS, preload=TRAINING) == [0]
        self.expected = losses(alone)

    def draw(self, generator: random.Random) -> tuple[int, tuple[str, ...]]:
        """(ranks, overrides) of a layout that is legal for the model; ZeRO now and then."""
        world = generator.choice(RANKS)
        config = configuration(self.folder / "any", self.corpus, *SETTINGS)
        mesh = generator.choice(legal(config, world))
        chosen = [f"mesh={json.dumps(mesh.model_dump(exclude_defaults=True))}"]
        if generator.random() < 0.3:
            zero = ["engine.kind=deepspeed", f"engine.stage={generator.choice((1, 2, 3))}"]
            if _accepted(configuration(self.folder / "any", self.corpus, *SETTINGS, *chosen, *zero), world):
                chosen += zero
        return world, tuple(chosen)

    def trial(self, generator: random.Random) -> tuple[str, list[str]]:
        """(what was run, what was wrong with it)."""
        self.number += 1
        run = self.folder / f"reshaped {self.number}"
        path, faults = [], []
        for start in range(STARTS):
            world, chosen = self.draw(generator)
            path.append(f"{world} rank(s) {' '.join(chosen)}")
            last = 2 * (start + 1)
            stop = last if last < 6 else None
            codes = run_ranks(started_again, world, run, self.corpus, (*SETTINGS, *chosen), stop, preload=TRAINING)
            if codes != [75 if stop else 0] * world:
                faults.append(f"start {start + 1} ended with {codes}")
                break
        found = losses(run)
        steps = [record["step"] for record in records(run)]
        if steps != list(range(1, len(self.expected) + 1)):
            faults.append(f"steps {steps}")
        worst = max(abs(a - b) / b for a, b in zip(found, self.expected, strict=False))
        if worst > LOSS:
            faults.append(f"losses differ by {worst:.1e}")
        return " -> ".join(path), faults


def _accepted(config: RunConfig, world: int) -> bool:
    try:
        layout.check(config, world)
    except ConfigError:
        return False
    return True
