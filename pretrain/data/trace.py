"""Which documents, and which tokens of them, every rank sees at a step of a run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.data.errors import UsageError
from pretrain.data.loader import Loader
from pretrain.data.opening import loader_of, open_sources, sources_of
from pretrain.data.packing import Row
from pretrain.data.stream import Reference
from pretrain.data.streaming import TextSource
from pretrain.data.streaming_lane import Window
from pretrain.data.streaming_loader import StreamingLoader

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class Seen:
    """One sequence of a step. micro_batch, place: which of the rank's micro-batches, and where in it."""

    rank: int
    micro_batch: int
    place: int
    reference: Reference
    row: Row | Window


def seen(loader: Loader, step: int, ranks: int) -> Iterator[Seen]:
    """All sequences of a step, rank by rank in the order in which each computes them."""
    streamed = loader.windows(step) if isinstance(loader, StreamingLoader) else {}
    for rank in range(ranks):
        for number, references in enumerate(loader.references(step, rank, ranks)):
            for place, reference in enumerate(references):
                row = streamed.get(reference) or loader.stream.row(reference)
                yield Seen(rank, number, place, reference, row)


def loader_at(config: RunConfig, step: int, ranks: int) -> tuple[Loader, str]:
    """A loader as the run has it at a step, and in words from which state: that of the newest checkpoint before it.

    Raises ValueError for a checkpoint of another order than the configuration's, DataError.
    """
    from pretrain.checkpoint import folder

    corpora = open_sources(config.data, config.model.vocabulary)
    loader = loader_of(config.data, corpora, config.train.batch, config.train.micro_batch, 0, ranks)
    checkpoints = config.run / "checkpoints"
    found = folder.loadable(checkpoints, lambda line: None) if checkpoints.is_dir() else []
    before = [entry for entry in found if entry.step <= step]
    if before:
        newest = max(before, key=lambda entry: entry.step)
        loader.load_state_dict(newest.record["meta"]["data"])
        return loader, f"going on from {newest.path}"
    if found:
        # Later checkpoints still know which version of the order the run began with.
        saved = found[0].record["meta"]["data"]
        loader.load_state_dict({**loader.state_dict(), "order_version": saved["order_version"]})
    return loader, "from the beginning"


def _asked(args: argparse.Namespace) -> tuple[RunConfig, Loader, int, str]:
    from pretrain.config import ConfigError, load

    if args.paths:
        raise UsageError(f"{args.paths[0]!r} is no override; write key=value")
    try:
        config = load(args.config, args.overrides)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    ranks = args.ranks or config.mesh.dp or int(os.environ.get("WORLD_SIZE", 1))
    if args.step < 0:
        raise UsageError(f"--step {args.step}: steps are counted from 0, the first one of the run")
    loader, since = loader_at(config, args.step, ranks)
    return config, loader, ranks, since


def describe(loader: Loader, found: Seen, names: list[str]) -> str:
    """One line: rank, micro-batch and place; source, epoch and number of the sequence; documents with their tokens."""
    reference, row = found.reference, found.row
    head = f"rank {found.rank} micro-batch {found.micro_batch} sequence {found.place}: {names[reference.source]}"
    if isinstance(row, Window):
        text = _streamed(loader, reference)
        spans = ", ".join(f"{text.units.where(p.unit, p.at)} [{p.start}, {p.start + p.length})" for p in row.pieces)
        return f"{head} lane {row.lane} number {row.number}: {spans}"
    windows = loader.stream.arrangement(reference.run, reference.source).windows_per_epoch
    epoch, number = divmod(reference.sequence, windows)
    spans = ", ".join(f"document {p.document} [{p.start}, {p.start + p.length})" for p in row.pieces)
    length = next(s.sequence_length for s in loader.stream.stages if s.run == reference.run)
    rest = f"; {length - row.inputs} of padding" if row.inputs < length else ""
    return f"{head} epoch {epoch} number {number}: {spans}{rest}"


def _streamed(loader: Loader, reference: Reference) -> TextSource:
    assert isinstance(loader, StreamingLoader)
    return loader.texts.sources[reference.source]


def parts(loader: Loader, found: Seen) -> Iterator[tuple[str, int, int, list[int]]]:
    """The documents of a sequence: the name, where in it the piece begins, the document's size, and the piece's tokens."""
    if isinstance(found.row, Window):
        text, at = _streamed(loader, found.reference), 0
        for part in found.row.pieces:
            yield (
                text.units.where(part.unit, part.at),
                part.start,
                part.size,
                found.row.ids[at:][: part.length].tolist(),
            )
            at += part.length
        return
    corpus = loader.corpora[found.reference.source]
    for piece in found.row.pieces:
        ids = corpus.read(piece.document, piece.start, piece.length).tolist()
        yield f"document {piece.document}", piece.start, int(corpus.lengths[piece.document]), ids


def run_trace(args: argparse.Namespace) -> None:
    """`python -m pretrain.data trace`."""
    config, loader, ranks, since = _asked(args)
    names = [source.label for source in sources_of(config.data)]
    print(heading(loader, args.step, ranks, since))
    for found in seen(loader, args.step, ranks):
        if args.rank is None or found.rank == args.rank:
            print(describe(loader, found, names))


def run_inspect_step(args: argparse.Namespace) -> None:
    """`python -m pretrain.data inspect --config X --step N`: as trace, with the text."""
    from rich.console import Console
    from rich.text import Text

    config, loader, ranks, since = _asked(args)
    names = [source.label for source in sources_of(config.data)]
    console = Console(soft_wrap=True, highlight=False)
    console.print(heading(loader, args.step, ranks, since), markup=False)
    tokenizers = [corpus.tokenizer() if corpus.tokenizer_path else None for corpus in loader.corpora]
    for found in seen(loader, args.step, ranks):
        if args.rank is not None and found.rank != args.rank:
            continue
        console.print(f"\n{describe(loader, found, names)}", style="bold", markup=False)
        tokenizer = tokenizers[found.reference.source]
        for name, start, size, ids in parts(loader, found):
            end = start + len(ids)
            begins, ends = "begins" if start == 0 else "goes on", "ends" if end == size else "is cut"
            head = f"--- {name} {begins}: tokens {start} to {end} of {size}, {ends} ---"
            console.print(head, style="cyan", markup=False)
            console.print(Text(tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))))


def heading(loader: Loader, step: int, ranks: int, since: str) -> str:
    stage = loader.stage(step)
    return (
        f"step {step} (counted from 0): {stage.batch} sequences of {stage.sequence_length} tokens over {ranks} "
        f"data-parallel rank(s), after {loader.tokens(step)} tokens; order version {loader.stream.version}, {since}"
    )
