"""How long the documents of corpora are, how many bytes of text a token stands for, and each source's share of them all.

`python -m pretrain.data statistics`: tables, numbers for programs (`--json`) and a picture (`--plot`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain.data.errors import UsageError
from pretrain.data.store import Corpus

_BLOCK = 1 << 22
_COUNTED = 1 << 20  # lengths below are counted one by one; the few documents beyond are kept
_SAMPLE, _SAMPLE_TOKENS = 4096, 1 << 14
SHARES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Statistics:
    """One split of one source.

    tokens: with bos and eos. bytes: of text, None if neither a manifest nor a tokenizer tells. weight: the source's share
    of the sequences of a run, None without one. lengths: tokens of a document (least, p10, median, mean, p90, p99, most).
    histogram: (least length, documents, tokens of these) of bins that double. bytes_per_token: of the whole split, None as
    bytes. spread: bytes per token of single documents, sorted, of a sample of up to 4096 evenly spaced ones.
    """

    name: str
    split: str
    documents: int
    tokens: int
    bytes: int | None
    weight: float | None
    lengths: dict[str, float]
    histogram: list[tuple[int, int, int]]
    bytes_per_token: float | None
    spread: list[float]


def _lengths(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(int64 lengths that occur, sorted, int64 documents of each), in memory that hardly grows with the corpus."""
    counts, beyond = np.zeros(_COUNTED, np.int64), []
    for first in range(0, corpus.documents, _BLOCK):
        lengths = np.diff(corpus.starts[first : first + _BLOCK + 1])
        large = lengths >= _COUNTED
        beyond.append(lengths[large])
        counts += np.bincount(lengths[~large], minlength=_COUNTED)
    some, times = np.unique(np.concatenate([*beyond, np.zeros(0, np.int64)]), return_counts=True)
    found = np.flatnonzero(counts)
    return np.concatenate([found, some]), np.concatenate([counts[found], times])


def _bytes(corpus: Corpus, split: str) -> int | None:
    """Bytes of text: the manifest's count, or the tokens' own, added up."""
    if corpus.manifest is not None:
        return corpus.manifest.splits[split].bytes
    if corpus.token_bytes is None:
        return None
    table = corpus.token_bytes.numpy()
    total = 0
    for first in range(0, corpus.tokens, _BLOCK):
        ids = corpus.raw(first, min(_BLOCK, corpus.tokens - first))
        corpus.check_ids(ids, first * corpus.dtype.itemsize)
        total += int(table[ids].sum(dtype=np.int64))
    return total


def _spread(corpus: Corpus) -> list[float]:
    if corpus.token_bytes is None:
        return []
    table, found = corpus.token_bytes.numpy(), []
    for number in range(min(_SAMPLE, corpus.documents)):
        document = number * corpus.documents // min(_SAMPLE, corpus.documents)
        ids = corpus.read(document, 0, min(int(corpus.starts[document + 1] - corpus.starts[document]), _SAMPLE_TOKENS))
        if ids.size:
            found.append(round(float(table[ids].sum(dtype=np.int64)) / ids.size, 4))
    return sorted(found)


def statistics(corpus: Corpus, name: str, split: str = "train", weight: float | None = None) -> Statistics:
    """What there is to say about a split. Raises DataError for damaged tokens."""
    values, documents = _lengths(corpus)
    upto = np.cumsum(documents)
    places = {key: np.searchsorted(upto, share * upto[-1]) for key, share in SHARES.items()}
    mean = round(corpus.tokens / corpus.documents, 2)
    lengths: dict[str, float] = {"least": int(values[0]), **{key: int(values[at]) for key, at in places.items()}}
    lengths |= {"mean": mean, "most": int(values[-1])}
    bins = np.where(values > 0, np.floor(np.log2(np.maximum(values, 1))), -1).astype(np.int64) + 1
    counts = np.bincount(bins, weights=documents).astype(np.int64)
    tokens = np.bincount(bins, weights=documents * values).astype(np.int64)
    first = int(bins[0])
    histogram = [
        (2 ** (place - 1) if place else 0, int(counts[place]), int(tokens[place]))
        for place in range(first, len(counts))
    ]
    size = _bytes(corpus, split)
    rate = None if size is None else round(size / corpus.tokens, 4)
    return Statistics(
        name, split, corpus.documents, corpus.tokens, size, weight, lengths, histogram, rate, _spread(corpus)
    )


def of_paths(paths: Sequence[str], tokenizer: str | None) -> Iterator[Statistics]:
    """Of every split of folders that `prepare` wrote, and of bare pairs."""
    names = [Path(path).name for path in paths]
    for path, name in zip(paths, names):
        shown = path if names.count(name) > 1 else name
        corpus = Corpus.open(path, tokenizer=tokenizer)
        yield statistics(corpus, shown)
        if corpus.manifest is not None:
            for split in [split for split in corpus.manifest.splits if split != "train"]:
                yield statistics(Corpus.open(path, split), shown, split)


def of_run(config: str, overrides: Sequence[str]) -> Iterator[Statistics]:
    """Of the training text of a run's sources, with their weights. Streamed sources are left out: nobody has counted them."""
    from pretrain.config import ConfigError, load
    from pretrain.data.opening import open_sources, sources_of

    try:
        run = load(config, list(overrides))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    sources = sources_of(run.data)
    total = sum(source.weight for source in sources)
    for source, corpus in zip(sources, open_sources(run.data, run.model.vocabulary)):
        if isinstance(corpus, Corpus):
            yield statistics(corpus, source.label, weight=source.weight / total if total else None)


def tables_of(found: Sequence[Statistics]) -> tuple[Table, Table]:
    """Sizes and lengths, a line for each source and split. Shares are of all lines of a split together."""
    sizes, lengths = (
        Table(header_style="bold"),
        Table(header_style="bold", title="tokens of a document", title_style="bold"),
    )
    weighted = any(each.weight is not None for each in found)
    for table in (sizes, lengths):
        table.add_column("source", no_wrap=True)
        table.add_column("split", no_wrap=True)
    for heading in ("documents", "tokens", "share", *["weight"] * weighted, "bytes/token"):
        sizes.add_column(heading, justify="right", no_wrap=True)
    keys = list(found[0].lengths)
    for heading in keys:
        lengths.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        of_split = sum(other.tokens for other in found if other.split == each.split)
        row = [each.name, each.split, f"{each.documents:,}", f"{each.tokens:,}", f"{each.tokens / of_split:.1%}"]
        row += ["" if each.weight is None else f"{each.weight:.1%}"] * weighted
        sizes.add_row(*row, "" if each.bytes_per_token is None else f"{each.bytes_per_token:.3f}")
        lengths.add_row(each.name, each.split, *(f"{each.lengths[key]:,.0f}" for key in keys))
    return sizes, lengths


def run_statistics(args: argparse.Namespace) -> None:
    """`python -m pretrain.data statistics`."""
    from pretrain.data.statistics_plot import check, draw

    if bool(args.paths) == (args.config is not None):
        raise UsageError(
            "statistics takes folders or prefixes, or the configuration of a run as --config (and key=value)"
        )
    if args.plot:
        check(Path(args.plot))
    found = list(of_run(args.config, args.overrides) if args.config else of_paths(args.paths, args.tokenizer))
    if not found:
        raise UsageError(f"{args.config} has streamed sources only, whose documents nobody has counted")
    console = Console(soft_wrap=True)
    for table in tables_of(found):
        # In full, however narrow the window: lines that wrap can be read, numbers that are cut cannot.
        console.width = max(console.width, console.measure(table).maximum)
        console.print(table)
    for each in found:
        console.print(f"\n{each.name}, {each.split}: documents by length (tokens)", style="bold")
        console.print("\n".join(_lines(each)))
    if args.json:
        rows: list[dict[str, Any]] = [asdict(each) for each in found]
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(found, Path(args.plot))
        console.print(f"\nwrote {args.plot}", markup=False)


def _lines(each: Statistics, width: int = 40) -> Iterator[str]:
    most = max(documents for _, documents, _ in each.histogram)
    for least, documents, tokens in each.histogram:
        bar = "█" * max(round(width * documents / most), 1 if documents else 0)
        last = max(2 * least - 1, 0)
        yield f"{least:>11,} to {last:>11,} {documents:>11,} {tokens / each.tokens:>6.1%} of the tokens {bar}".rstrip()
