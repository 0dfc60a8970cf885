"""How fast batches are read and steps are found, as ratios within one run; and both on a synthetic index.

`python -m pretrain.data bench`: writes a corpus of random tokens to a temporary folder. The yardstick is what a loop
without documents would do with the same bytes: slices of a memory map at random places, made into int64 tokens and
targets. Each round times all ways one after the other, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pretrain.data.best_fit import BestFit
from pretrain.data.index import MAGIC
from pretrain.data.loader import Loader
from pretrain.data.stages import Stage
from pretrain.data.store import Corpus
from pretrain.data.stream import Stream


def lengths_of(tokens: int, mean: int, seed: int = 0) -> np.ndarray:
    """Document lengths, int64, that add up to about `tokens`: log-normal, as those of web text are."""
    chance = np.random.default_rng(seed)
    drawn = chance.lognormal(np.log(mean) - 0.5, 1.0, max(1, tokens // mean))
    return np.maximum(drawn.astype(np.int64), 2)


def write(prefix: Path, lengths: np.ndarray, vocabulary: int, seed: int = 0) -> None:
    """A Megatron pair of uint16 random tokens."""
    ends = np.cumsum(lengths)
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        file.write(MAGIC)
        file.write(np.array([1], "<u8").tobytes() + bytes([8]))
        file.write(np.array([len(lengths), len(lengths) + 1], "<u8").tobytes())
        file.write(lengths.astype("<i4").tobytes())
        file.write(((ends - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    chance = np.random.default_rng(seed)
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        for start in range(0, int(ends[-1]), 1 << 24):
            size = min(1 << 24, int(ends[-1]) - start)
            file.write(chance.integers(0, vocabulary, size, dtype=np.uint16).tobytes())


def _raw(path: Path, windows: int, length: int) -> Callable[[int], int]:
    ids = np.memmap(path, np.uint16, mode="r")
    chance = np.random.default_rng(0)

    def read(step: int) -> int:
        starts = chance.integers(0, len(ids) - length - 1, windows).tolist()
        tokens = torch.from_numpy(np.concatenate([ids[s : s + length].astype(np.int64) for s in starts]))
        targets = torch.from_numpy(np.concatenate([ids[s + 1 : s + 1 + length].astype(np.int64) for s in starts]))
        return tokens.numel() + 0 * targets.numel()

    return read


def _loader(loader: Loader) -> Callable[[int], int]:
    return lambda step: sum(batch.tokens.numel() for batch in loader.batches(step))


def run_bench(args: argparse.Namespace) -> None:
    """`python -m pretrain.data bench`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "random")
        write(prefix, lengths_of(args.tokens, args.document), 50_000)
        corpus = Corpus.open(prefix, vocabulary_size=50_000)
        print(f"{corpus.tokens:,} tokens in {corpus.documents:,} documents; {args.rows} rows of {args.length} a batch")
        common = {"sequence_length": args.length, "global_batch": args.rows, "micro_batch": args.rows, "seed": 0}
        ways = {
            "raw slices": _raw(corpus.bin_path, args.rows, args.length),
            "concatenated, masked": _loader(Loader(corpus, **common)),
            "concatenated, not masked": _loader(Loader(corpus, **common, masked=False)),
            "best fit": _loader(Loader(corpus, **common, packing="best_fit")),
            "order version 1": _loader(Loader(corpus, **common, version=1)),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for each in range(args.rounds + 1):
            for name, read in ways.items():
                start = time.perf_counter()
                tokens = sum(read(each * args.steps + step) for step in range(args.steps))
                if each:  # the first round brings the file into memory
                    speeds[name].append(tokens / (time.perf_counter() - start))
        for name, found in speeds.items():
            ratio = statistics.median(a / b for a, b in zip(found, speeds["raw slices"]))
            print(f"{name:28}{statistics.median(found) / 1e6:9.1f} M tokens/s {ratio:8.0%} of raw slices")
    seek(args.index, args.document, args.length)


def seek(tokens: int, mean: int, length: int) -> None:
    """Finding steps on a synthetic index: a new stream's first question, and the median and worst of many."""
    lengths = lengths_of(tokens, mean)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    print(f"\nseek: an index of {int(starts[-1]):,} tokens in {len(lengths):,} documents")
    chance = np.random.default_rng(1)
    for name, packing, version in (("concatenated", "concatenate", 2), ("order version 1", "concatenate", 1)):
        begin = time.perf_counter()
        stream = Stream([starts], [Stage(0, 256, 1, length)], 0, packing, version)
        opened = time.perf_counter() - begin
        steps = [int(step) for step in chance.integers(0, 3 * int(starts[-1]) // length // 256, 21)]
        taken = []
        for step in steps if version == 2 else steps[:3]:
            begin = time.perf_counter()
            for reference in stream.references(step, range(256)):
                stream.row(reference)
            taken.append(1e3 * (time.perf_counter() - begin))
        print(
            f"{name:28}opened in {1e3 * opened:.1f} ms; all 256 sequences of a step: first {taken[0]:.1f} ms, "
            f"median {statistics.median(taken):.1f} ms, worst {max(taken):.1f} ms"
        )
    begin = time.perf_counter()
    few = BestFit(starts[: 64 * 1024 + 1], length, 0)
    taken_all = time.perf_counter() - begin
    print(
        f"{'best fit':28}{1e6 * taken_all / (64 * 1024):.2f} s a million documents to count the sequences when it is "
        f"opened; {few.padding:.2%} padding"
    )
