"""Validation loss and bits per byte at intervals and at the end, over all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from parallel.mesh import Mesh
from pretrain.data.batch import Batch
from pretrain.data.store import Corpus
from pretrain.data.validation import ValidationSet
from pretrain.evaluate.perplexity import score
from pretrain.train import heartbeat, metrics
from pretrain.train.callback import Callback, Run
from pretrain.train.metrics import finite, keep_until
from pretrain.train.progress import Progress

FILE = "validation.jsonl"
ASK = 4  # batches; every rank has equally many, so all ask each other at the same ones whether one was told to stop


class Validation(Callback):
    """flag: whether this rank was told to stop. A validation that was cut short leaves no record; the next start does it."""

    phase = "validation"

    def __init__(
        self, corpora: dict[str, Corpus], progress: Progress, mesh: Mesh, flag: Callable[[], bool] = lambda: False
    ):
        self.corpora, self.progress, self.mesh, self.flag = corpora, progress, mesh, flag
        self.cut = False

    def on_start(self, run: Run) -> None:
        missing = False
        if run.processes.first:
            # A finished run that is started again validates again: its last line is replaced.
            finished = run.step >= run.config.train.steps
            keep_until(run.folder / FILE, run.step - 1 if finished else run.step)
            path = run.folder / FILE
            missing = run.step not in {record["step"] for record in metrics.read(path)} if path.exists() else True
        if self._due(run) and run.processes.broadcast(missing):
            self.validate(run, run.config.validation.sequences)

    def on_step(self, run: Run) -> None:
        if self._due(run):
            self.validate(run, run.config.validation.sequences)
            heartbeat.phase("step", run.step)

    def _due(self, run: Run) -> bool:
        every = run.config.validation.every
        return every is not None and 0 < run.step < run.config.train.steps and run.step % every == 0

    def on_rewind(self, run: Run) -> None:
        if run.processes.first:
            keep_until(run.folder / FILE, run.step)

    def on_end(self, run: Run) -> None:
        if run.stop is None:
            self.validate(run, None)
            heartbeat.phase("end", run.step)

    def validate(self, run: Run, sequences: int | None) -> None:
        """Scores so many sequences of each source. The blend's numbers are those of all their targets together."""
        processes = run.processes
        results: dict[str, dict[str, float]] = {}
        for name, corpus in self.corpora.items():
            results[name] = self._score(run, corpus, sequences)
            if self.cut:
                run.stop = "preempted"
                return
        result = together(list(results.values()))
        record: dict[str, Any] = {"step": run.step, "tokens": run.tokens, **result}
        if len(results) > 1:
            record["sources"] = {name: finite(each) for name, each in results.items()}
        scope = "whole validation split" if sequences is None else f"{sequences} validation sequences"
        bits = "" if math.isnan(result["bits_per_byte"]) else f"  {result['bits_per_byte']:.3f} bits per byte"
        self.progress.say(f"step {run.step}: validation loss {result['validation_loss']:.4f}{bits}  ({scope})")
        if processes.first:
            with (run.folder / FILE).open("a") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def _score(self, run: Run, corpus: Corpus, sequences: int | None) -> dict[str, float]:
        config = run.config
        batches = ValidationSet(
            corpus,
            sequence_length=config.data.sequence_length,
            micro_batch=config.train.micro_batch,
            rank=self.mesh.dp_rank,
            ranks=self.mesh.dp_size,
            limit=sequences,
        )
        return score(
            run.engine.evaluate,
            run.model,
            self._until_told(batches, run),
            corpus.token_bytes,
            run.processes,
            config.train.precision,
            self.mesh,
        )

    def _until_told(self, batches: ValidationSet, run: Run) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            heartbeat.phase("evaluation", run.step)  # for each batch: the whole split takes longer than a part of it
            if number % ASK == 0 and run.processes.sum([float(self.flag())])[0] > 0:
                self.cut = True
                return
            yield batch


def together(results: list[dict[str, float]]) -> dict[str, float]:
    """The result over all targets of several corpora from the results of each."""
    if len(results) == 1:
        return results[0]
    tokens, size = (int(sum(each[key] for each in results)) for key in ("scored_tokens", "scored_bytes"))
    nats = sum(each["validation_loss"] * each["scored_tokens"] for each in results)
    counted = all(each["scored_bytes"] for each in results)
    return {
        "validation_loss": nats / max(1, tokens),
        "bits_per_byte": nats / math.log(2) / size if counted else math.nan,
        "scored_tokens": tokens,
        "scored_bytes": size,
    }
