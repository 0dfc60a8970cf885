"""What the stack costs besides the model: its step beside a bare loop over the same model, optimizer and batches.

Both do the same arithmetic on the same weights, alternating in one process, so a busy machine slows both alike. The bare loop
has its batches in memory and does nothing but forward, backward, clip and update; the stack also reads data, counts FLOPs,
balances experts, writes metrics and prints.

    python -m launch.overhead --data data/quickstart --pairs 40
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from parallel import processes
from pretrain.checkpoint.agreement import Agreement
from pretrain.config import load
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.model.decoder import Decoder
from pretrain.train.build import assemble
from pretrain.train.loop import Loop


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.overhead", description="Measure the framework's own cost.")
    parser.add_argument("--config", default="configs/runs/quickstart.yaml")
    parser.add_argument("--data", default="data/quickstart", help="a prepared corpus")
    parser.add_argument("--pairs", type=int, default=40, help="steps of each kind, alternating (default 40)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


def bare_step(model: Decoder, optimizer: torch.optim.Optimizer, batches: list[Batch], lr: float) -> float:
    """One step as a short script would write it."""
    targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens) / targets
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run={folder}/run", f"data.path={arguments.data}", f"train.steps={10**6}", "validation.every=null",
            f"checkpoint.every={10**6}", "train.device=cpu", *arguments.overrides,
        ]  # fmt: skip
        job = processes.join("cpu")
        Path(folder, "run").mkdir()
        loop = Loop(assemble(load(arguments.config, overrides), job, Agreement()), (), lambda: False)
        loop.begin()
        model = loop.run.model
        assert isinstance(model, Decoder)  # one process holds all of it
        optimizer = loop.run.engine.optimizer  # type: ignore[attr-defined]
        config, corpus = loop.run.config, loop.parts.loader.corpus
        reader = Loader(
            corpus, sequence_length=config.data.sequence_length, global_batch=config.train.batch,
            micro_batch=config.train.micro_batch, seed=config.data.seed,
        )  # fmt: skip
        stack: list[float] = []
        bare: list[float] = []
        for pair in range(arguments.pairs + 3):
            batches = reader.batches(loop.run.step)  # the very batches of the stack's next step
            for kind in ("stack", "bare") if pair % 2 else ("bare", "stack"):
                start = time.perf_counter()
                if kind == "stack":
                    loop.once()
                else:
                    bare_step(model, optimizer, batches, 1e-5)
                if pair >= 3:
                    (stack if kind == "stack" else bare).append(time.perf_counter() - start)
        loop.close()
    difference = statistics.median(a - b for a, b in zip(stack, bare))
    base = statistics.median(bare)
    quarters = statistics.quantiles((a / b - 1 for a, b in zip(stack, bare)), n=4)
    print(
        f"bare loop {1e3 * base:.1f} ms a step, stack {1e3 * statistics.median(stack):.1f} ms, medians of {len(bare)} pairs"
    )
    print(f"overhead {1e3 * difference:+.2f} ms = {100 * difference / base:+.2f}% (pairs' quartiles "
          f"{100 * quarters[0]:+.1f}% to {100 * quarters[2]:+.1f}%; load average {os.getloadavg()[0]:.1f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
