"""How long it takes to build and to open the index of a large corpus, and how much memory.

`python -m pretrain.data bench index`: writes the `.idx` of documents of random lengths, beside a `.bin` that is all
holes and so takes no space, opens the pair as training would, finds tokens in it and reads a step. megatron-core's
builder is measured too, on fewer documents, because what it keeps grows with them.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.errors import UsageError
from pretrain.data.loader import Loader
from pretrain.data.megatron import indexed_dataset
from pretrain.data.store import Corpus
from pretrain.data.writer import IndexWriter

_LENGTHS = 1 << 16  # lengths that are drawn, and then used again and again
_AT_ONCE = 128  # documents that are added together: some 500 kB of text, as a preparation would


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What `work` returns, the seconds it took and the bytes by which this process grew at most meanwhile (Linux)."""
    gc.collect()
    with suppress(OSError):  # resets the highest mark; where that is not allowed, the mark may be an older one
        Path("/proc/self/clear_refs").write_text("5")
    before, begin = _status("VmRSS"), time.perf_counter()
    found = work()
    return found, time.perf_counter() - begin, max(0, _status("VmHWM") - before)


def lengths_of(documents: int, mean: int) -> np.ndarray:
    """Log-normal document lengths, as those of web text are: int64, _LENGTHS or fewer."""
    chance = np.random.default_rng(0)
    return np.maximum(chance.lognormal(np.log(mean) - 0.5, 1.0, min(documents, _LENGTHS)).astype(np.int64), 1)


def build(prefix: Path, documents: int, lengths: np.ndarray) -> int:
    """Writes the index with the lengths in turn; returns how many tokens it has."""
    with IndexWriter(prefix, np.uint16) as index:
        while index.documents < documents:
            first = index.documents % len(lengths)
            index.add(lengths[first : first + min(_AT_ONCE, documents - index.documents)])
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        file.truncate(2 * index.tokens)
    return index.tokens


def _first_step(corpus: Corpus, length: int) -> None:
    loader = Loader(corpus, sequence_length=length, global_batch=16, micro_batch=16, seed=0)
    (batch,) = loader.batches(0)
    assert batch.tokens.numel() == 16 * length
    loader.close()


def build_with_peer(prefix: Path, documents: int, lengths: np.ndarray) -> None:
    """The same by megatron-core's builder, without the tokens."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    size, given = len(lengths), lengths.tolist()
    for number in range(documents):
        builder.add_document(np.zeros(0, np.uint16), [given[number % size]])
    builder.finalize(f"{prefix}.idx")


def run_bench(args: argparse.Namespace) -> None:
    """`python -m pretrain.data bench index`."""
    if min(args.documents, args.mean) < 1:
        raise UsageError("--documents and --mean must be at least 1")
    lengths = lengths_of(args.documents, args.mean)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prefix = Path(folder, "synthetic")
        tokens, seconds, grown = measured(lambda: build(prefix, args.documents, lengths))
        size = prefix.with_name("synthetic.idx").stat().st_size
        print(f"index of {args.documents:,} documents, {tokens:,} tokens: {size / 1e6:,.1f} MB")
        _print("built", seconds, grown, args.documents)
        corpus, seconds, grown = measured(lambda: Corpus.open(prefix, vocabulary_size=1))
        _print("opened: every number checked", seconds, grown, args.documents)
        assert (corpus.documents, corpus.tokens) == (args.documents, tokens)
        chance = np.random.default_rng(1).integers(0, tokens, 1000)
        begin = time.perf_counter()
        found = [int(corpus.starts.searchsorted(place, side="right")) - 1 for place in chance]
        taken = (time.perf_counter() - begin) / len(found)
        assert all(corpus.starts[i] <= place < corpus.starts[i + 1] for i, place in zip(found, chance))
        print(f"{'a token found, at random':34}{1e6 * taken:9.1f} us")
        _, seconds, grown = measured(partial(_first_step, corpus, min(4096, tokens // 32)))
        _print("a loader's first step", seconds, grown, args.documents)
        del corpus
        if args.peer:
            indexed_dataset()
            peer = Path(folder, "peer")
            few = min(args.peer, args.documents)
            _, seconds, grown = measured(lambda: build_with_peer(peer, few, lengths))
            _print(f"megatron-core's builder, {few:,}", seconds, grown, few)
            build(Path(folder, "same"), few, lengths)
            same = Path(folder, "same.idx").read_bytes() == Path(folder, "peer.idx").read_bytes()
            print(f"the two indices of {few:,} documents are {'the same bytes' if same else 'DIFFERENT'}")


def _print(name: str, seconds: float, grown: int, documents: int) -> None:
    each = f"{grown / documents:8.1f} bytes a document"
    print(f"{name:34}{seconds:9.2f} s {1e9 * seconds / documents:8.0f} ns a document {grown / 1e6:9.1f} MB more {each}")
