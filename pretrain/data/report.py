"""What a person sees while `prepare` runs and when it is done."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pretrain.data.assemble import merge
from pretrain.data.errors import UsageError
from pretrain.data.filters import Filters
from pretrain.data.hub import HubDataset
from pretrain.data.manifest import Manifest
from pretrain.data.options import PrepareOptions, default_workers
from pretrain.data.parts import folder_of
from pretrain.data.prepare import run
from pretrain.data.vocabulary import symbols_of

_LINE_SECONDS = 15.0


def options_of(args: argparse.Namespace) -> PrepareOptions:
    """The options that a command line gives. Raises ValueError."""
    return PrepareOptions(
        input=args.input,
        output=Path(args.output),
        exclude=args.exclude,
        format=args.format,
        text_field=args.text_field,
        vocabulary=args.vocabulary,
        tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        validation=args.validation,
        workers=args.workers if args.workers is not None else default_workers(),
        seed=args.seed,
        limit_bytes=args.limit_bytes,
        sample_bytes=args.sample_bytes,
        document_bytes=args.document_bytes,
        on_bad=args.on_bad,
        overwrite=args.overwrite,
        datasets=[HubDataset.parse(name, args.split, args.streaming, args.revision) for name in args.dataset],
        shuffle=args.shuffle,
        filters=Filters.of(
            min_length=args.min_length,
            max_length=args.max_length,
            language=args.language,
            language_field=args.language_field,
        ),
        near_duplicates=args.near_duplicates,
        byte_fallback=args.byte_fallback,
        user_symbols=symbols_of(args.user_symbols) if args.user_symbols else (),
        shard=_shard(args.shard),
        restart=args.restart,
        unit_bytes=args.unit_bytes,
    )


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {text!r}: pass 1/N, 2/N, ... N/N on N machines")
    return int(number), int(count)


def run_prepare(args: argparse.Namespace) -> None:
    """`python -m pretrain.data prepare`."""
    options = options_of(args)
    started = time.monotonic()
    with _Shown() as shown:
        done = run(options, shown.report)
    console = Console(soft_wrap=True)
    console.print(f"{done} in {time.monotonic() - started:.1f} s", highlight=False)
    for note in done.notes:
        console.print(f"skipped: {note}", style="yellow", markup=False, highlight=False)
    if done.manifest is not None:
        summary(done.manifest, options.output, time.monotonic() - started, console)
    else:
        assert options.shard is not None
        _next_shard(options, console)


def _next_shard(options: PrepareOptions, console: Console) -> None:
    assert options.shard is not None
    number, shards = options.shard
    console.print(f"\nshard {number} of {shards} is in {folder_of(options.output)}. When all are there:", markup=False)
    console.print(f"  python -m pretrain.data merge --output {options.output}", markup=False)


def run_merge(args: argparse.Namespace) -> None:
    """`python -m pretrain.data merge`."""
    output = Path(args.output)
    started = time.monotonic()
    with _Shown() as shown:
        folders = [Path(folder) for folder in args.parts] or [folder_of(output)]
        manifest = merge(folders, output, args.overwrite, args.keep, shown.report)
    summary(manifest, output, time.monotonic() - started, Console(soft_wrap=True))


class _Shown:
    """Progress: bars on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self.tasks: dict[str, tuple[TaskID, float, int]] = {}
        self.spoken = time.monotonic()

    def __enter__(self) -> _Shown:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)

    def report(self, stage: str, done: int, total: int, note: str = "") -> None:
        """See pretrain.data.prepare.Report. Speed and remaining time count from a stage's first report on: units that
        were found finished cost nothing.
        """
        now = time.monotonic()
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total or None, amount=""), now, done
        task, began, before = self.tasks[stage]
        amount = amounts(done, total, done - before, now - began, note)
        self.progress.update(task, completed=done, amount=amount)
        if not self.console.is_terminal and now - self.spoken > _LINE_SECONDS:
            self.spoken = now
            self.console.print(f"{stage}: {amount}", markup=False, highlight=False)


def amounts(done: int, total: int, moved: int, seconds: float, note: str = "") -> str:
    """`3 of 64 units, 1.2 of 25.6 MB, 4.1 MB/s, 0:06 left`. done, total, moved: bytes; moved: in these seconds."""
    words = [note] if note else []
    if total:
        words.append(f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")
    if moved > 0 and seconds > 0:
        speed = moved / seconds
        left = round(max(total - done, 0) / speed)
        words += [f"{speed / 1e6:.1f} MB/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
    return ", ".join(words)


def split_table(manifest: Manifest) -> Table:
    """Documents, tokens and bytes of each split."""
    table = Table(title=None, header_style="bold")
    table.add_column("split")
    for heading in ("documents", "tokens", "text bytes", "bytes/token", "longest document"):
        table.add_column(heading, justify="right")
    for name, split in manifest.splits.items():
        row = (split.documents, split.tokens, split.bytes, split.bytes_per_token, split.longest_document)
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in row))
    return table


def summary(manifest: Manifest, output: Path, seconds: float, console: Console) -> None:
    """The closing words of `prepare`: counts, what was left out, and what to do next."""
    console.print(split_table(manifest))
    made = "trained" if manifest.tokenizer.trained else "given"
    console.print(f"tokenizer: {manifest.tokenizer.vocabulary_size} ids ({made}), token ids stored as {manifest.dtype}")
    left_out = ", ".join(f"{count} {kind}" for kind, count in manifest.dropped.items() if count)
    datasets = [f"{dataset['name']} ({dataset['split']})" for dataset in manifest.settings.get("datasets", [])]
    read = ", ".join([f"{manifest.input_files} files"] * bool(manifest.input_files or not datasets) + datasets)
    console.print(f"{read} in {seconds:.1f} s" + (f"; left out: {left_out}" if left_out else ""))
    if not manifest.tokenizer.lossless:
        console.print(
            "warning: this tokenizer does not keep every byte, so bits per byte will be approximate", style="yellow"
        )
    console.print(f"\nwrote {output}. Next:", markup=False)
    console.print(f"  python -m pretrain.data inspect {output}", markup=False)
    console.print(f"  python pretrain/main.py --config configs/runs/quickstart.yaml data.path={output}", markup=False)
