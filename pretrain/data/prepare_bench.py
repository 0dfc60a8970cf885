"""How fast text is prepared, against the SentencePiece library alone, and how much two processes bring.

`python -m pretrain.data bench prepare`: takes Python sources of this machine as its text, trains a tokenizer on some of them,
and writes them as jsonl files. A round does, one after the other: the library alone, `encode` of every document in memory, in
one process and in several; the same with this project's tokenizer, which hands long texts to the library in pieces; whole
preparations (reading, parsing, hashes, tokens, merge, manifest) by one process and by several. Ratios are taken within
rounds, and their medians shown, so that what else the machine does meets all alike. Starting processes is part of a
preparation: on little text it is most of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.data.errors import UsageError
from pretrain.data.options import PrepareOptions
from pretrain.data.prepare import prepare
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.vocabulary import train

_SHARD_BYTES = 2_000_000


def texts_of(patterns: list[str], limit: int) -> list[str]:
    """Different documents of about `limit` bytes in all, from the files that the globs match or from Python's own."""
    from pretrain.data.sources import expand

    if patterns:
        files = expand(patterns)
    else:
        roots = dict.fromkeys(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
        files = [path for root in roots for path in sorted(root.rglob("*.py"))]
    found: dict[str, None] = {}
    size = 0
    for path in files:
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
        if text and text not in found:
            found[text] = None
            size += len(text.encode())
        if size >= limit:
            return list(found)
    if not found:
        raise UsageError("no text to measure with: name files as --input")
    return list(found)


def write(texts: list[str], folder: Path) -> None:
    """The documents as jsonl files of about 2 MB."""
    number, size = 0, 0
    lines: list[str] = []
    for text in [*texts, None]:
        if text is None or size >= _SHARD_BYTES:
            (folder / f"{number:05d}.jsonl").write_text("".join(lines), encoding="utf-8")
            number, size, lines = number + 1, 0, []
        if text is not None:
            lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(lines[-1])


def _alone(model: str, texts: list[str]) -> float:
    """Seconds that the library takes for all documents, once it is loaded."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    processor.encode("warm")
    begin = time.perf_counter()
    for text in texts:
        processor.encode(text)
    return time.perf_counter() - begin


def _ours(model: Path, texts: list[str]) -> float:
    """As `_alone`, with the tokenizer of this project, which gives the library long texts in pieces."""
    tokenizer = Tokenizer(model)
    tokenizer.encode("warm")
    begin = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    return time.perf_counter() - begin


def _together(model: str, texts: list[str], processes: int) -> float:
    """As `_alone`, the documents dealt to processes that are there already: the slowest counts."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_alone, [(model, ["warm"])] * processes, chunksize=1)
        return max(pool.starmap(_alone, [(model, texts[i::processes]) for i in range(processes)], chunksize=1))


def _prepared(model: Path, folder: Path, workers: int) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        options = PrepareOptions(
            [f"{folder}/*.jsonl"], Path(place, "corpus"), tokenizer=model, workers=workers, validation=0.0
        )
        begin = time.perf_counter()
        prepare(options)
        return time.perf_counter() - begin


def measure(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def run_bench(args: argparse.Namespace) -> None:
    """`python -m pretrain.data bench prepare`."""
    texts = texts_of(args.input, args.bytes)
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "bench.model"
        train(texts[:: max(1, size // args.sample_bytes)], args.vocabulary, model)
        write(texts, folder)
        several = args.processes
        print(
            f"{size / 1e6:.1f} MB of text in {len(texts):,} documents, {args.vocabulary} ids; medians of {args.rounds} rounds"
        )
        ways: dict[str, Callable[[], float]] = {
            "library alone": lambda: _alone(str(model), texts),
            "tokenizer alone": lambda: _ours(model, texts),
            f"library alone, {several} processes": lambda: _together(str(model), texts, several),
            "prepare, 1 process": lambda: _prepared(model, folder, 1),
            f"prepare, {several} processes": lambda: _prepared(model, folder, several),
        }
        _show(measure(ways, args.rounds), size)


def _show(seconds: dict[str, list[float]], size: int) -> None:
    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(y / x for x, y in zip(a, b, strict=True))

    alone, ours, several_alone, one, several = seconds.values()
    beside = [
        "",
        f"{ratio(ours, alone):.0%} of the library alone",
        f"{ratio(several_alone, alone):.2f}x",
        f"{ratio(one, alone):.0%} of the library alone, {ratio(one, ours):.0%} of the tokenizer alone",
        f"{ratio(several, one):.2f}x of one process",
    ]
    for (name, found), words in zip(seconds.items(), beside, strict=True):
        print(f"{name:32}{size / statistics.median(found) / 1e6:8.2f} MB/s  {words}".rstrip())
