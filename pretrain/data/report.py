"""What a person sees while `prepare` runs and when it is done."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pretrain.data.manifest import Manifest
from pretrain.data.prepare import PrepareOptions, default_workers, prepare


def run_prepare(args: argparse.Namespace) -> None:
    """`python -m pretrain.data prepare`."""
    options = PrepareOptions(
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
    )
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, amount="")
            amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else ""
            progress.update(tasks[stage], completed=done, amount=amount)

        manifest = prepare(options, report)
    summary(manifest, options.output, time.monotonic() - started, Console(soft_wrap=True))


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
    console.print(f"{manifest.input_files} files in {seconds:.1f} s" + (f"; left out: {left_out}" if left_out else ""))
    if not manifest.tokenizer.lossless:
        console.print(
            "warning: this tokenizer does not keep every byte, so bits per byte will be approximate", style="yellow"
        )
    console.print(f"\nwrote {output}. Next:", markup=False)
    console.print(f"  python -m pretrain.data inspect {output}", markup=False)
    console.print(f"  python pretrain/main.py --config configs/runs/quickstart.yaml data.path={output}", markup=False)
