"""Runs in which something goes wrong in its numbers: what is done to them, and what assertions read of them afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.layout import local
from pretrain.exit import Exit
from pretrain.model.router import Router
from pretrain.model.stage import Stages
from pretrain.train.callback import Callback, Run
from pretrain.train.faults.events import FILE
from pretrain.train.validation import Validation
from tests.pretrain.train.small_run import StopAfter, checkpoint_tensors, configuration, records, train
from tests.ranks import TRAINING, run_ranks

COMMON = (
    "train.precision=fp32",
    "checkpoint.every=1",
    "checkpoint.keep=20",
    "faults.replica_check_every=1",  # in all these runs: a false alarm would be an event
    "faults.loss_factor=30",  # of at least a hundredth of the median: far beyond what the first steps of a model vary
    "faults.norm_factor=null",
)
SPIKES = ("faults.history=3", "faults.window=4")


def flip(values: Tensor) -> Tensor:
    """A copy in which the top bit of the exponent has flipped in the largest element, and in some of every token's."""
    flipped = values.detach().clone(memory_format=torch.contiguous_format)
    flat = flipped.view(-1)
    words = flat.view(torch.int32)
    words[::33] ^= 1 << 30
    words[flat.abs().argmax()] |= 1 << 30
    return flipped


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: x * math.nan,
    "inf": lambda x: x * math.inf,
    "scale": lambda x: x * 10,
    "flip": flip,
}


class Damage(Callback):
    """Does something to a number of one rank (None: of all) while the given steps (from 1) are computed.

    where: loss; batch (what the embedding puts out); gradient (of the last layer's input); router (its logits).
    times: how often in all, replays included; None for always.
    """

    def __init__(self, where: str, how: str, steps: set[int], rank: int | None = None, times: int | None = None):
        self.where, self.how, self.steps, self.rank, self.left = where, how, steps, rank, times

    def on_start(self, run: Run) -> None:
        self.run, model = run, run.model
        if self.rank is not None and run.processes.rank != self.rank:
            return
        if isinstance(model, Stages):  # a gradient of this rank's part
            assert self.where == "gradient"
            next(model.parameters()).register_hook(self.done)
        elif self.where == "loss":
            model.register_forward_hook(lambda module, inputs, output: self.done(output))
        elif self.where == "batch":
            model.embedding.register_forward_hook(lambda module, inputs, output: self.done(output))
        elif self.where == "gradient":
            # Where all the parameters before it, on all ranks, are given what goes wrong.
            def watch(module: Any, inputs: Any) -> None:
                if inputs[0].requires_grad:
                    inputs[0].register_hook(self.done)

            model.blocks[-1].register_forward_pre_hook(watch)
        else:
            assert self.where == "router"
            router = next(module for module in model.modules() if isinstance(module, Router))
            route = router.route
            router.route = lambda x: route(self.done(x))  # type: ignore[method-assign]

    def done(self, value: Tensor) -> Tensor:
        if self.where != "gradient" and not torch.is_grad_enabled():
            return value  # an evaluation
        if self.run.step + 1 not in self.steps or self.left == 0:
            return value
        if self.left is not None:
            self.left -= 1
        return DAMAGE[self.how](value)


class Noise(Callback):
    """Random numbers in the model, which a replay must draw alike."""

    def on_start(self, run: Run) -> None:
        for module in run.model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.register_forward_hook(
                    lambda module, inputs, output: (
                        output * (1 + 0.1 * torch.randn_like(output)) if torch.is_grad_enabled() else output
                    )
                )


class Corrupt(Callback):
    """Flips a bit of one rank's memory after the given steps: in a parameter, or in the optimizer's state of it."""

    def __init__(self, name: str, steps: list[int], rank: int):
        self.name, self.steps, self.rank = name, list(steps), rank

    def on_step(self, run: Run) -> None:
        if self.steps and run.step == self.steps[0]:
            self.steps.pop(0)  # before the ranks part: a step that is made again finds no second fault
            tensor: Any = run.engine.state_tensors()[self.name]
            if run.processes.rank == self.rank:
                own = local(getattr(tensor, "held", tensor)).view(-1)
                own.view(torch.int32)[own.numel() // 2] ^= 1 << 12


class Seen(Callback):
    """The first tokens of every micro-batch that this rank computes gradients of."""

    def __init__(self) -> None:
        self.first: list[tuple[int, ...]] = []

    def on_start(self, run: Run) -> None:
        def note(module: Any, inputs: Any) -> None:
            if torch.is_grad_enabled():
                self.first.append(tuple(inputs[0].flatten()[:8].tolist()))

        run.model.embedding.register_forward_pre_hook(note)


def job(
    rank: int, world: int, run: Path, corpus: Path, overrides: tuple[str, ...], callbacks: list[Callback]
) -> tuple[int | str, Any]:
    """(exit code or the text of an Exit with its code, what Seen saw)."""
    Validation.on_end = lambda self, run: None  # type: ignore[method-assign]  # which these tests do not look at
    seen = next((one.first for one in callbacks if isinstance(one, Seen)), None)
    try:
        return train(configuration(run, corpus, *COMMON, *overrides), callbacks), seen
    except Exit as error:
        return f"{error.exit_code}: {error}", seen


def go(
    world: int,
    run: Path,
    corpus: Path,
    *overrides: str,
    callbacks: list[Callback] | None = None,
    stop: int | None = None,
) -> list[Any]:
    """Runs a job; the ranks' answers, which must be alike. Returns [answer, what each rank's Seen saw...]."""
    extra = [*(callbacks or []), *([StopAfter(stop)] if stop is not None else [])]
    found = run_ranks(job, world, run, corpus, overrides, extra, preload=TRAINING)
    assert len({answer for answer, _ in found}) == 1, found
    return [found[0][0], *(seen for _, seen in found)]


def events(run: Path) -> list[dict[str, Any]]:
    return records(run, FILE) if (run / FILE).exists() else []


def kinds(run: Path) -> list[tuple[int, str]]:
    """(step, event) of every event."""
    return [(event["step"], event["event"]) for event in events(run)]


def folder(run: Path, step: int) -> Path:
    """The newest save of a step."""
    found = sorted((run / "checkpoints").glob(f"step_{step:08d}*"), key=lambda path: (len(path.name), path.name))
    return found[-1]


def meta(run: Path, step: int) -> dict[str, Any]:
    return json.loads((folder(run, step) / "meta.json").read_text())["meta"]


def state(run: Path, step: int, kinds: tuple[str, ...] = ("model", "optimizer", "rank")) -> dict[str, torch.Tensor]:
    tensors = checkpoint_tensors(folder(run, step))
    return {name: tensor for name, tensor in tensors.items() if name.split("/")[0] in kinds}


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run)]
