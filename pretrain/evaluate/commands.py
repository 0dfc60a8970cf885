"""What `python -m pretrain.evaluate` does: one model, several tasks, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parallel.processes import Processes
from pretrain.data.batch import Batch
from pretrain.evaluate import mqar, needle, report, sources
from pretrain.evaluate.perplexity import loss_of, score
from pretrain.evaluate.subject import Subject
from pretrain.evaluate.tasks import HARNESS
from pretrain.evaluate.windows import batches, cost
from pretrain.exit import FINISHED, USAGE, Exit
from pretrain.loading import Opened, open_checkpoint

Advance = Callable[[int], None]
HAYSTACK_TOKENS = 1 << 20


@dataclass
class Session:
    """The model, what was asked, and the bar that shows how far it is."""

    subject: Subject
    opened: Opened
    arguments: argparse.Namespace
    bar: Progress
    _sources: list[sources.Source] | None = None

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Advance]:
        task = self.bar.add_task(what, total=total)
        yield lambda count: self.bar.advance(task, count)
        self.bar.update(task, visible=False)

    def sources(self) -> list[sources.Source]:
        """What --text and --data name; without them what the run itself validates on."""
        if self._sources is None:
            arguments, tokenizer = self.arguments, self.subject.tokenizer
            found = [sources.of_text(path, tokenizer) for path in arguments.text]
            if arguments.data:
                found.append(sources.of_corpus(arguments.data, arguments.split, tokenizer))
            self._sources = found or sources.of_run(self.opened.config, tokenizer)
        return self._sources


def run(arguments: argparse.Namespace) -> int:
    """Runs the tasks in the order given. Results go to the table on stdout and to --json, progress to stderr."""
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise Exit(f"--{name} {path}: no such folder; make it first", USAGE)
    opened = open_checkpoint(arguments.checkpoint, arguments.device, arguments.memory_limit, arguments.offload)
    context = arguments.context or opened.config.data.sequence_length
    subject = Subject(opened.model, opened.tokenizer, context, arguments.batch, arguments.precision)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        session = Session(subject, opened, arguments, bar)
        for name in dict.fromkeys(arguments.tasks):
            if name.startswith(HARNESS):
                continue
            results[name] = {"perplexity": perplexity, "mqar": recall, "needle": haystack}[name](session)
        wanted = [name.removeprefix(HARNESS) for name in dict.fromkeys(arguments.tasks) if name.startswith(HARNESS)]
        if wanted:
            results["lm_eval"] = harness(session, wanted)
    record = {
        "checkpoint": str(opened.checkpoint),
        "step": opened.step,
        "context": context,
        "precision": arguments.precision,
        "seed": arguments.seed,
        "results": results,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.finite(record), indent=2, allow_nan=False) + "\n")
    report.show(record)
    return FINISHED


def perplexity(session: Session) -> list[dict[str, Any]]:
    """Every source by itself, every token of it once."""
    arguments, subject = session.arguments, session.subject
    stride = arguments.stride or max(1, subject.context // 2)
    vocabulary = subject.model.embedding.weight.shape[0]
    alone = Processes(0, 1, 0, subject.device)
    results = []
    for source in session.sources():
        targets = [count for count in source.targets(arguments.limit) if count]
        if not targets:
            raise Exit(f"{source.name} has no text to score", USAGE)
        with session.progress(
            f"perplexity {source.name}", sum(cost(n, subject.context, stride) for n in targets)
        ) as advance:
            rows = batches(source.documents(arguments.limit), subject.context, stride, subject.batch)
            # The byte table is as long as the tokenizer's vocabulary, so a target beyond it is found here.
            found = score(
                loss_of(subject.model),
                subject.model,
                _watched(rows, advance, vocabulary, source.name),
                _table(subject),
                alone,
                subject.precision,
            )
        nats, size = found["validation_loss"] * found["scored_tokens"], int(found["scored_bytes"])
        whole = arguments.limit is None or sum(targets) == sum(source.targets())
        if source.bytes is not None and whole:
            if size != source.bytes:
                print(f"note: the tokenizer loses or changes some of {source.name}", file=sys.stderr)
            size = source.bytes
        per_token = found["validation_loss"]
        results.append(
            {
                "source": source.name,
                "tokens": int(found["scored_tokens"]),
                "bytes": size,
                "nats_per_token": per_token,
                "perplexity": math.exp(per_token) if per_token < 700 else math.inf,
                "bits_per_byte": nats / math.log(2) / size if size else math.nan,
                "stride": stride,
            }
        )
    return results


def _table(subject: Subject) -> Any:
    import torch

    return torch.from_numpy(subject.tokenizer.token_bytes)


def _watched(rows: Iterator[Batch], advance: Advance, vocabulary: int, name: str) -> Iterator[Batch]:
    for batch in rows:
        if int(batch.tokens.max()) >= vocabulary:
            raise Exit(
                f"{name}: token id {int(batch.tokens.max())} is outside the model's vocabulary of {vocabulary}", USAGE
            )
        yield batch
        advance(batch.tokens.numel())


def recall(session: Session) -> list[dict[str, Any]]:
    """Accuracy by number of pairs."""
    arguments, subject = session.arguments, session.subject
    length = arguments.mqar_length or subject.context
    pairs = arguments.mqar_pairs or [n for n in (4, 8, 16, 32, 64, 128, 256) if 4 * n <= length - 1]
    too_many = [n for n in pairs if 4 * n > length - 1]
    if too_many or not pairs:
        raise Exit(
            f"mqar: {too_many[0] if too_many else 4} pairs do not fit in {length} tokens; ask for at most {(length - 1) // 4} "
            "pairs, or give a longer --mqar-length",
            USAGE,
        )
    results = []
    with session.progress("mqar", len(pairs) * arguments.mqar_examples) as advance:
        for n in pairs:
            found = mqar.recall(subject, n, arguments.mqar_examples, length, arguments.seed, advance)
            results.append({"pairs": n, "length": length, "chance_among_values": 1 / n, **found})
    return results


def haystack(session: Session) -> dict[str, Any]:
    """Exact match and log-probability by length and depth."""
    arguments, subject = session.arguments, session.subject
    lengths = arguments.needle_lengths or sorted({max(2, subject.context // 2), subject.context})
    ids, name = _hay(session)
    total = sum(lengths) * len(arguments.needle_depths) * arguments.needle_samples
    with session.progress("needle", total) as advance:
        found = needle.grid(
            subject, ids, lengths, arguments.needle_depths, arguments.needle_samples, arguments.seed, advance
        )
    found["haystack"] = name
    if arguments.plot:
        needle.draw(
            found, f"{session.opened.checkpoint.parent.parent.name}, step {session.opened.step}", Path(arguments.plot)
        )
    return found


def _hay(session: Session) -> tuple[list[int], str]:
    """Running text: --text or --data, else the run's own, else (its corpus being elsewhere, or with --synthetic) made up."""
    arguments = session.arguments
    if not arguments.synthetic:
        try:
            source = session.sources()[0]
            ids = source.some_ids(HAYSTACK_TOKENS)
            if ids:
                return ids, source.name
        except Exit as error:
            if arguments.text or arguments.data:
                raise
            print(f"note: a made-up haystack: {error}", file=sys.stderr)
    return session.subject.tokenizer.encode(needle.synthetic(arguments.seed)), "synthetic"


def harness(session: Session, names: list[str]) -> dict[str, dict[str, float]]:
    """Tasks of lm-evaluation-harness."""
    from pretrain.evaluate.harness import evaluate

    arguments = session.arguments
    with session.progress("lm_eval", None) as advance:
        return evaluate(
            session.subject,
            names,
            folder=arguments.lm_eval_tasks,
            limit=arguments.limit,
            fewshot=arguments.fewshot,
            seed=arguments.seed,
            advance=advance,
        )
