"""How quickly text is streamed: `python -m pretrain.data.streaming_bench --input GLOB --tokenizer MODEL`.

Against the tokenizer alone on the same rows, read by this process and by others; and how long it takes to begin in the midst.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from pretrain.data.config import SourceConfig, StreamConfig
from pretrain.data.stages import Stage
from pretrain.data.streaming import TextSource, open_text
from pretrain.data.streaming_loader import StreamingLoader


def tokenizer_alone(source: TextSource, tokens: int) -> float:
    """Tokens a second of the tokenizer, on rows that are in memory."""
    tokenizer, found, units = source.tokenizer(), 0, iter(range(source.units.count))
    tokenizer.encode("loaded at its first use")
    seconds = 0.0
    while found < tokens and (unit := next(units, None)) is not None:
        texts = [text.text for block in source.units.blocks(unit, 0) for text in block.texts]
        start = time.perf_counter()
        found += sum(len(tokenizer.encode(text)) + 2 for text in texts)
        seconds += time.perf_counter() - start
    return found / seconds


def loader(source: TextSource, length: int, workers: int) -> StreamingLoader:
    return StreamingLoader([source], stages=[Stage(0, 32, 32, length)], seed=0, workers=workers)


def streamed(source: TextSource, length: int, tokens: int, workers: int) -> float:
    """Tokens a second of a loader of steps of 32 sequences, once its processes are there."""
    made = loader(source, length, workers)
    try:
        for step in range(3):
            made.batches(step)
        steps = max(1, tokens // (32 * length))
        start = time.perf_counter()
        for step in range(3, 3 + steps):
            made.batches(step)
        return steps * 32 * length / (time.perf_counter() - start)
    finally:
        made.close()


def going_on(source: TextSource, length: int, steps: int) -> tuple[float, float]:
    """(milliseconds of a lane, of all 32 lanes) from a state after so many steps to the first batch."""
    before = loader(source, length, 0)
    for step in range(steps):
        before.batches(step)
    state = before.state_dict()
    after = loader(source, length, 0)
    source.tokenizer().encode("loaded at its first use")
    start = time.perf_counter()
    after.load_state_dict(state)
    after.batches(steps)
    seconds = time.perf_counter() - start
    return 1000 * seconds / after.texts.lanes[0], 1000 * seconds


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pretrain.data.streaming_bench", description=__doc__)
    parser.add_argument("--input", required=True, help="glob or folder of text, jsonl or Parquet files")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    arguments = parser.parse_args(words)
    source = open_text(SourceConfig(path=Path(arguments.input), stream=StreamConfig()), arguments.tokenizer, False)
    rounds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        rounds.setdefault("tokenizer_alone", []).append(tokenizer_alone(source, arguments.tokens))
        for workers in arguments.workers:
            found = streamed(source, arguments.length, arguments.tokens, workers)
            rounds.setdefault(f"streamed_{workers}_processes", []).append(found)
    median = {name: sorted(found)[len(found) // 2] for name, found in rounds.items()}
    lane, every = going_on(source, arguments.length, 20)
    ratios = {f"{name}_ratio": round(rate / median["tokenizer_alone"], 3) for name, rate in median.items()}
    rates = {f"{name}_tokens_per_second": round(rate) for name, rate in median.items()}
    state = {"units": source.units.count, "going_on_lane_ms": round(lane, 2), "going_on_32_lanes_ms": round(every, 1)}
    print(json.dumps({**rates, **ratios, **state}, indent=2))


if __name__ == "__main__":
    main()
