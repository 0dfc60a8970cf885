"""Validation loss and bits per byte at intervals and at the end, over all ranks."""

from __future__ import annotations

import json
import math
from typing import Any

from parallel.mesh import Mesh
from pretrain.data.store import Corpus
from pretrain.data.validation import ValidationSet
from pretrain.evaluate.perplexity import score
from pretrain.train.callback import Callback, Run
from pretrain.train.metrics import finite, keep_until
from pretrain.train.progress import Progress

FILE = "validation.jsonl"


class Validation(Callback):
    def __init__(self, corpus: Corpus, progress: Progress, mesh: Mesh):
        self.corpus, self.progress, self.mesh = corpus, progress, mesh

    def on_start(self, run: Run) -> None:
        if run.processes.first:
            # A finished run that is started again validates again: its last line is replaced.
            finished = run.step >= run.config.train.steps
            keep_until(run.folder / FILE, run.step - 1 if finished else run.step)

    def on_step(self, run: Run) -> None:
        every = run.config.validation.every
        if every is not None and run.step % every == 0 and run.step < run.config.train.steps:
            self.validate(run, run.config.validation.sequences)

    def on_end(self, run: Run) -> None:
        if run.stop is None:
            self.validate(run, None)

    def validate(self, run: Run, sequences: int | None) -> None:
        config, processes = run.config, run.processes
        batches = ValidationSet(
            self.corpus,
            sequence_length=config.data.sequence_length,
            micro_batch=config.train.micro_batch,
            rank=self.mesh.dp_rank,
            ranks=self.mesh.dp_size,
            limit=sequences,
        )
        result = score(
            run.engine.evaluate,
            run.model,
            batches,
            self.corpus.token_bytes,
            processes,
            config.train.precision,
            self.mesh,
        )
        record: dict[str, Any] = {"step": run.step, "tokens": run.tokens, **result}
        scope = "whole validation split" if sequences is None else f"{sequences} validation sequences"
        bits = "" if math.isnan(result["bits_per_byte"]) else f"  {result['bits_per_byte']:.3f} bits per byte"
        self.progress.say(f"step {run.step}: validation loss {result['validation_loss']:.4f}{bits}  ({scope})")
        if processes.first:
            with (run.folder / FILE).open("a") as file:
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")
