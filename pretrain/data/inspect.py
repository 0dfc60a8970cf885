"""What a corpus holds, for people: tables, a histogram, frequent tokens, and sequences as training sees them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.data.errors import DataError
from pretrain.data.index import REPAIR, check_size, read_header, read_modes
from pretrain.data.manifest import Manifest, check_hash
from pretrain.data.order import Order, Span
from pretrain.data.report import split_table
from pretrain.data.store import Corpus
from pretrain.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 24
_COUNTED_TOKENS = 200_000_000
_BAR = 40


def run_inspect(args: argparse.Namespace) -> None:
    """`python -m pretrain.data inspect`."""
    console = Console(soft_wrap=True, highlight=False)
    corpus = Corpus.open(args.paths[0], tokenizer=args.tokenizer)
    tokenizer = corpus.tokenizer() if corpus.tokenizer_path else None
    if corpus.manifest is not None:
        console.print(split_table(corpus.manifest))
    else:
        console.print(f"{corpus.prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens of {corpus.dtype}")
        for line in sequences(corpus):
            console.print(line)
    if args.verify:
        for line in verify(corpus):
            console.print(f"verified: {line}")
    console.print("\ndocument lengths (tokens)", style="bold")
    console.print("\n".join(histogram(corpus.lengths)))
    console.print()
    console.print(frequent_table(corpus, tokenizer))
    for document in range(min(args.documents, corpus.documents)):
        size = min(args.sequence_length, int(corpus.lengths[document]))
        console.print(f"\ndocument {document}", style="bold")
        _print_spans(console, corpus, tokenizer, [Span(document, 0, size)])
    if args.samples:
        order = Order(corpus.lengths, args.sequence_length, args.seed)
        epoch = f"{order.windows_per_epoch:,} sequences of {args.sequence_length} tokens in an epoch"
        console.print(f"\n{epoch}; the first {args.samples} with seed {args.seed}:", style="bold")
        for sequence in range(args.samples):
            console.print(f"\nsequence {sequence}", style="bold")
            _print_spans(console, corpus, tokenizer, order.spans(sequence))


def sequences(corpus: Corpus) -> Iterator[str]:
    """What a Megatron pair says beyond its documents: that they are several sequences each, and the modes of these."""
    header = read_header(corpus.prefix.with_name(corpus.prefix.name + ".idx"))
    if header.sequences != corpus.documents:
        yield f"its documents are {header.sequences:,} sequences, which Megatron's GPTDataset takes for documents"
    modes = read_modes(corpus.prefix)
    if modes is not None:
        kinds, counts = np.unique(modes, return_counts=True)
        found = ", ".join(f"{count:,} of mode {kind}" for kind, count in zip(kinds.tolist(), counts.tolist()))
        yield f"its sequences have modes ({found}), which training does not look at"


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a text histogram with bins that double."""
    bins = np.maximum(lengths, 1)
    exponents = np.floor(np.log2(bins)).astype(int)
    counts = np.bincount(exponents)
    lines = []
    for exponent in range(int(exponents.min()), len(counts)):
        count = int(counts[exponent])
        bar = "█" * max(round(_BAR * count / int(counts.max())), 1 if count else 0)
        lines.append(f"{2**exponent:>12,} to {2 ** (exponent + 1) - 1:>12,} {count:>12,} {bar}")
    return lines


def _blocks(corpus: Corpus) -> Iterator[tuple[int, np.ndarray]]:
    """(byte offset, ids) for consecutive blocks of the whole `.bin`."""
    ids = np.memmap(corpus.bin_path, dtype=corpus.dtype, mode="r")
    for start in range(0, len(ids), _BLOCK_TOKENS):
        yield start * corpus.dtype.itemsize, ids[start : start + _BLOCK_TOKENS]


def count_tokens(corpus: Corpus, limit: int | None = None) -> np.ndarray:
    """int64 [vocabulary]: how often each id occurs in the first `limit` tokens. Raises DataError for an id outside."""
    counts = np.zeros(corpus.vocabulary_size or 0, np.int64)
    left = corpus.tokens if limit is None else min(limit, corpus.tokens)
    for offset, block in _blocks(corpus):
        block = block[:left]
        corpus.check_ids(block, offset)
        found = np.bincount(block, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        left -= len(block)
        if left <= 0:
            break
    return counts


def frequent_table(corpus: Corpus, tokenizer: Tokenizer | None, rows: int = 20) -> Table:
    """The most frequent tokens and their share."""
    counts = count_tokens(corpus, _COUNTED_TOKENS)
    total = counts.sum()
    table = Table(header_style="bold", title="most frequent tokens", title_justify="left", title_style="bold")
    for heading in ("id", "token", "count", "share"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    for token in np.argsort(-counts, kind="stable")[:rows]:
        if counts[token]:
            piece = tokenizer.piece(int(token)) if tokenizer else ""
            table.add_row(str(token), Text(piece), f"{counts[token]:,}", f"{counts[token] / total:.2%}")
    used = int((counts > 0).sum())
    of_all = f" of the first {total:,} tokens" if total < corpus.tokens else ""
    table.caption = f"{used:,} of {len(counts):,} ids occur{of_all}"
    return table


def _print_spans(console: Console, corpus: Corpus, tokenizer: Tokenizer | None, spans: list[Span]) -> None:
    for span in spans:
        size, end = int(corpus.lengths[span.document]), span.start + span.length
        begins = "begins" if span.start == 0 else "goes on"
        ends = "ends" if end == size else "is cut"
        head = f"--- document {span.document:,} {begins}: tokens {span.start:,} to {end:,} of {size:,}, {ends} ---"
        console.print(head, style="cyan")
        ids = corpus.read(span.document, span.start, span.length).tolist()
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        console.print(Text(text))  # as Text: square brackets in source code are not markup


def verify(corpus: Corpus) -> Iterator[str]:
    """Reads everything. Yields a line for each thing found right; raises DataError at the first that is wrong."""
    corpora = {"": corpus}
    if corpus.manifest is not None:
        folder = corpus.prefix.parent
        corpora = {name: Corpus.open(folder, name) for name in corpus.manifest.splits}
    for name, each in corpora.items():
        counts = count_tokens(each)
        yield f"{each.bin_path.name}: {each.tokens:,} token ids, all below {each.vocabulary_size or len(counts):,}"
        if each.manifest is not None and each.manifest.tokenizer.lossless and each.token_bytes is not None:
            found, stated = int(counts @ each.token_bytes.numpy().astype(np.int64)), each.manifest.splits[name].bytes
            if found != stated:
                raise DataError(f"{each.bin_path} spells {found} bytes of text, the manifest says {stated}; {REPAIR}")
            yield f"{each.bin_path.name}: spells {found:,} bytes of text"
    if corpus.manifest is not None:
        verify_hashes(corpus.prefix.parent, corpus.manifest)
        yield f"{len(corpus.manifest.files)} files match the hashes in the manifest"


def verify_hashes(folder: Path, manifest: Manifest) -> None:
    """Raises DataError for the first file of a prepared folder whose size or content differs from the manifest."""
    for name, stated in manifest.files.items():
        check_size(folder / name, stated.bytes, "manifest.json in the same folder")
        check_hash(folder / name, stated)
