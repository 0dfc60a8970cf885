"""Results as tables for people and as JSON for programs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(record: dict[str, Any]) -> None:
    """A table for each task, on stdout."""
    # In a pipe rich assumes 80 columns and cuts numbers short, which no script wants.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    console.print(
        f"{record['checkpoint']}, step {record['step']}, context {record['context']}", markup=False, soft_wrap=True
    )
    tables: dict[str, Callable[[Any], Table]]
    tables = {"perplexity": perplexity, "mqar": recall, "needle": needle, "lm_eval": harness}
    for name, found in record["results"].items():
        about = f" in {found['haystack']}: answers exact, nats per answer token" if name == "needle" else ""
        console.print(f"\n[bold]{name}[/bold]{escape(about)}", soft_wrap=True)
        console.print(tables[name](found))


def perplexity(found: list[dict[str, Any]]) -> Table:
    table = _table("source", "tokens", "bytes", "nats/token", "perplexity", "bits/byte")
    for row in found:
        counts = f"{row['tokens']:,}", f"{row['bytes']:,}"
        figures = f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.4g}", f"{row['bits_per_byte']:.4f}"
        table.add_row(escape(row["source"]), *counts, *figures)
    return table


def recall(found: list[dict[str, Any]]) -> Table:
    table = _table("pairs", "queries", "accuracy", "accuracy among values", "chance", "nats/value")
    for row in found:
        shares = (f"{row[key]:.1%}" for key in ("accuracy", "accuracy_among_values", "chance_among_values"))
        table.add_row(str(row["pairs"]), f"{row['queries']:,}", *shares, f"{row['nats_per_value']:.3f}")
    return table


def needle(found: dict[str, Any]) -> Table:
    lengths = [f"{length:,} tokens" for length in found["lengths"]]
    table = _table("depth", *lengths)
    for depth, exact, likely in zip(found["depths"], found["exact_match"], found["log_probability"]):
        table.add_row(f"{depth:.0%}", *(f"{share:.0%}  {nats:.2f}" for share, nats in zip(exact, likely)))
    return table


def harness(found: dict[str, dict[str, float]]) -> Table:
    table = _table("task", "measure", "value", "+-")
    for task, measures in found.items():
        for key, value in measures.items():
            name, _, rest = key.partition(",")
            if name.endswith("_stderr") or not rest:
                continue
            error = measures.get(f"{name}_stderr,{rest}")
            label = name if rest == "none" else f"{name} ({rest})"
            table.add_row(task, label, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    return table


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: such numbers become null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
