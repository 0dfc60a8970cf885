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

if TYPE_CHECKING:
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class Seen:
    """One sequence of a step. micro_batch, place: which of the rank's micro-batches, and where in it."""

    rank: int
    micro_batch: int
    place: int
    reference: Reference
    row: Row


def seen(loader: Loader, step: int, ranks: int) -> Iterator[Seen]:
    """All sequences of a step, rank by rank in the order in which each computes them."""
    for rank in range(ranks):
        for number, references in enumerate(loader.references(step, rank, ranks)):
            for place, reference in enumerate(references):
                yield Seen(rank, number, place, reference, loader.stream.row(reference))


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
    epoch, number = divmod(
        reference.sequence, loader.stream.arrangement(reference.run, reference.source).windows_per_epoch
    )
    spans = ", ".join(f"document {p.document} [{p.start}, {p.start + p.length})" for p in row.pieces)
    length = next(s.sequence_length for s in loader.stream.stages if s.run == reference.run)
    rest = f"; {length - row.inputs} of padding" if row.inputs < length else ""
    where = f"rank {found.rank} micro-batch {found.micro_batch} sequence {found.place}"
    return f"{where}: {names[reference.source]} epoch {epoch} number {number}: {spans}{rest}"


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
        source = found.reference.source
        corpus, tokenizer = loader.corpora[source], tokenizers[source]
        for piece in found.row.pieces:
            size, end = int(corpus.lengths[piece.document]), piece.start + piece.length
            begins, ends = "begins" if piece.start == 0 else "goes on", "ends" if end == size else "is cut"
            head = f"--- document {piece.document} {begins}: tokens {piece.start} to {end} of {size}, {ends} ---"
            console.print(head, style="cyan", markup=False)
            ids = corpus.read(piece.document, piece.start, piece.length).tolist()
            console.print(Text(tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))))


def heading(loader: Loader, step: int, ranks: int, since: str) -> str:
    stage = loader.stage(step)
    return (
        f"step {step} (counted from 0): {stage.batch} sequences of {stage.sequence_length} tokens over {ranks} "
        f"data-parallel rank(s), after {loader.tokens(step)} tokens; order version {loader.stream.version}, {since}"
    )
