"""The command: `python -m launch.step_bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.step_bench.models import COMMON, MODELS, PEERS, Task, document_lengths
from launch.step_bench.worker import Worker

EXAMPLES = """three models of 30 million active parameters: llama, gdn (Qwen3-Next's hybrid), moe (Qwen3-MoE).

examples:
  python -m launch.step_bench                          three models, fp32 and bf16
  python -m launch.step_bench --models gdn --precision bf16 --batch 1 --length 4096 --threads 1
  python -m launch.step_bench --documents 400          the same tokens, in documents of 400 tokens on average
  python -m launch.step_bench --same-host              transformers, too, with the host's settings of our runs"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.step_bench",
        description="Time whole training steps beside transformers' (pip install transformers==5.23.0).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="sequences (default 2)")
    parser.add_argument("--length", type=int, default=1024, metavar="T", help="tokens each (default 1024)")
    parser.add_argument(
        "--documents",
        type=int,
        metavar="MEAN",
        help="B x T tokens in documents of log-normal lengths about MEAN, at most T, none of which sees another: packed in one "
        "row by us; to transformers padded and, where it can, packed with a mask, of which the faster counts",
    )
    parser.add_argument(
        "--vocabulary", type=int, default=COMMON["vocabulary"], metavar="V", help=f"default {COMMON['vocabulary']}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each, in turn; medians count (default 7)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: as many as torch takes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--same-host",
        action="store_true",
        help="both processes keep the memory that they free, use large pages, flush denormal numbers and multiply with the "
        "library that our runs choose; else only ours does, as our runs do",
    )
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    arguments = parser.parse_args(argv)
    for name in ("batch", "length", "rounds", "documents", "vocabulary"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def documents(arguments: argparse.Namespace) -> tuple[int, ...]:
    batch, length, mean = arguments.batch, arguments.length, arguments.documents
    return (length,) * batch if mean is None else document_lengths(batch * length, mean, length)


def compare(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes and losses of both for one model, and the median of the rounds' ratios."""
    kind, layers = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            kind,
            {**COMMON, "vocabulary": arguments.vocabulary, **layers},
            precision,
            documents(arguments),
            arguments.device,
            Path(folder),
        )
        sides: dict[str, Worker] = {}
        try:
            # Theirs first: it makes the weights.
            for who, settled in (*((feed, arguments.same_host) for feed in task.feeds()), ("ours", True)):
                sides[who] = Worker(who, task, arguments.threads, settled and arguments.device == "cpu")
            return {"model": name, "peer": PEERS[name], "precision": precision} | measure(sides, name, arguments.rounds)
        finally:
            for side in sides.values():
                side.close()


def measure(sides: dict[str, Worker], name: str, rounds: int) -> dict[str, Any]:
    losses = {who: side.ask("loss") for who, side in sides.items()}
    apart = max(abs(losses["ours"] / loss - 1) for loss in losses.values())
    if apart > 1e-4:
        raise SystemExit(f"error: {name}: the models differ by {apart:.1e} in their loss: nothing to compare")
    for side in sides.values():
        side.ask("step")  # optimizer state, compiled code
    memory = {who: side.ask("memory") for who, side in sides.items()}
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    for turn in range(rounds + 1):
        for who in list(sides) if turn % 2 else reversed(sides):
            taken = sides[who].ask("step")
            if turn:
                seconds[who].append(taken)
    feed = min((who for who in sides if who != "ours"), key=lambda who: statistics.median(seconds[who]))
    ratio = statistics.median(a / b for a, b in zip(seconds[feed], seconds["ours"]))
    return {
        "ratio": ratio, "seconds": seconds, "memory": memory, "loss_difference": apart, "feed": feed,
        "parameters": sides["ours"].ask("parameters"),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if importlib.util.find_spec("transformers") is None:
        print("error: transformers is not installed: pip install transformers==5.23.0", file=sys.stderr)
        return 2
    import transformers

    lengths = sorted(documents(arguments))
    sequences = f"{len(lengths)} documents of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} together,"
    if lengths[0] == lengths[-1]:
        sequences = f"{len(lengths)} x {lengths[0]} tokens"
    print(
        f"{sequences} on {arguments.device}, "
        f"{arguments.threads or torch.get_num_threads()} thread(s), torch {torch.__version__}, transformers "
        f"{transformers.__version__}, load {os.getloadavg()[0]:.1f}; medians of {arguments.rounds} steps each; memory above "
        "weights and optimizer state"
    )
    print(f"{'model':7}{'precision':11}{'ours ms':>10}{'peer ms':>10}{'times':>8}{'ours MB':>10}{'peer MB':>10}  peer")
    rows = []
    for name in arguments.models:
        for precision in arguments.precision:
            row = compare(name, precision, arguments)
            rows.append(row)
            feed = row["feed"]
            times = {who: 1e3 * statistics.median(taken) for who, taken in row["seconds"].items()}
            megabytes = {who: float("nan") if size is None else size / 1e6 for who, size in row["memory"].items()}
            peer = row["peer"] if lengths[0] == lengths[-1] else f"{row['peer']}, {feed}"
            print(
                f"{name:7}{precision:11}{times['ours']:10.1f}{times[feed]:10.1f}{row['ratio']:8.2f}"
                f"{megabytes['ours']:10.0f}{megabytes[feed]:10.0f}  {peer}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
