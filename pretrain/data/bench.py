"""How fast batches are read and steps are found, as ratios within one run; and both on a synthetic index.

`python -m pretrain.data bench`: writes a corpus of random tokens to a temporary folder. The yardstick is what a loop
without documents would do with the same bytes: slices of a memory map at random places, made into int64 tokens and
targets. Each round times all ways one after the other, so that what else the machine does meets them alike; the time is
that of the thread on its core, of which neighbours take less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.data.index import MAGIC
from pretrain.data.layout import lay_out
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


def ways(corpus: Corpus, rows: int, length: int) -> dict[str, Callable[[int], int]]:
    """What is timed, raw slices first: each reads the batch of a step and says how many tokens it has."""
    common: dict[str, Any] = {"sequence_length": length, "global_batch": rows, "micro_batch": rows, "seed": 0}
    return {
        "raw slices": _raw(corpus.bin_path, rows, length),
        "concatenated": _loader(Loader(corpus, **common)),
        "not masked": _loader(Loader(corpus, **common, masked=False)),
        "best fit": _loader(Loader(corpus, **common, packing="best_fit")),
        "version 1": _loader(Loader(corpus, **common, version=1)),
    }


def speeds(read: dict[str, Callable[[int], int]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each way, in each round, by the time that this thread had a core to itself."""
    found: dict[str, list[float]] = {name: [] for name in read}
    for each in range(rounds + 1):
        for name, way in read.items():
            start = time.thread_time()
            tokens = sum(way(each * steps + step) for step in range(steps))
            if each:  # the first round brings the file into memory
                found[name].append(tokens / (time.thread_time() - start))
    return found


def run_bench(args: argparse.Namespace) -> None:
    """`python -m pretrain.data bench`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "random")
        write(prefix, lengths_of(args.tokens, args.document), 50_000)
        corpus = Corpus.open(prefix, vocabulary_size=50_000)
        print(
            f"{corpus.tokens:,} tokens in {corpus.documents:,} documents; sequences of {args.length}; million tokens/s"
        )
        for number, rows in enumerate(args.rows):
            read = ways(corpus, rows, args.length)
            if number == 0:
                print(f"{'rows a batch':>12}" + "".join(f"{name:>18}" for name in read))
            steps = max(args.steps, args.round_tokens // (rows * args.length))
            line = f"{rows:>12}"
            found = speeds(read, steps, args.rounds)
            for each in found.values():
                ratio = statistics.median(a / b for a, b in zip(each, found["raw slices"]))
                line += f"{statistics.median(each) / 1e6:>12.1f}{ratio:>6.0%}"
            print(line, flush=True)
    seek(args.index, args.document, args.length)


def seek(tokens: int, mean: int, length: int) -> None:
    """Finding steps on a synthetic index: a new stream's first question, and the median and worst of many."""
    lengths = lengths_of(tokens, mean)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    print(f"\nseek: an index of {int(starts[-1]):,} tokens in {len(lengths):,} documents, steps of 256 sequences")
    chance = np.random.default_rng(1)
    for name, packing, version in (
        ("concatenated", "concatenate", 2),
        ("best fit", "best_fit", 2),
        ("version 1", "concatenate", 1),
    ):
        begin = time.thread_time()
        stream = Stream([starts], [Stage(0, 256, 256, length)], 0, packing, version)
        windows = int(stream.arrangement(0, 0).windows_per_epoch)
        opened = time.thread_time() - begin
        steps = [int(step) for step in chance.integers(0, 3 * windows // 256, 21)]
        taken = []
        for step in steps if version == 2 else steps[:3]:
            begin = time.thread_time()
            sources, sequences = stream.sequences(step, np.arange(256))
            lay_out(stream, [starts], 0, sources, sequences, length, 256, True)
            taken.append(1e3 * (time.thread_time() - begin))
        line = f"{name:16}opened in {1e3 * opened:.1f} ms"
        if packing == "best_fit":
            each = 1e6 * opened / len(lengths)
            line += f" ({each:.2f} s a million documents; {stream.arrangement(0, 0).padding:.2%} padding)"
        print(f"{line}; found: first {taken[0]:.1f} ms, median {statistics.median(taken):.1f}, worst {max(taken):.1f}")
