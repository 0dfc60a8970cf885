"""A few steps of a run, each beside the same step on one rank and beside the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engines.torch import TorchEngine
from parallel.mesh import Mesh
from parallel.processes import Processes
from parallel.state import model_tensors, named_parameters
from parallel.whole import assemble, gradients
from pretrain.config import RunConfig
from pretrain.data.batch import Batch
from pretrain.model.decoder import Decoder
from pretrain.optim.matrices import describe
from pretrain.optim.muon import MuonConfig
from pretrain.optim.probe.judge import Line, judge
from pretrain.optim.probe.plain import Plain
from pretrain.train.build import engine_for
from pretrain.train.step import autocast

Batches = Callable[[int], list[Batch]]
"""Of a step (counted from 0): this rank's micro-batches."""


def probe(config: RunConfig, job: Processes, mesh: Mesh, batches: Batches, steps: int) -> list[Line]:
    """What became of every parameter, on the job's first rank; elsewhere nothing. Collective.

    Raises ValueError for an engine that does not show its gradients.
    """
    torch.manual_seed(config.train.seed)
    model = Decoder(config.model).to(job.device)
    witness = _Witness(config, model) if job.first else None
    engine = engine_for(config, mesh, model)
    del model
    if not isinstance(engine, TorchEngine):
        raise ValueError(
            f"engine.kind={config.engine.kind} does not show its gradients, from which the update is computed again; "
            "probe with engine.kind=torch"
        )
    part: Any = engine.model
    lr = config.optimizer.lr
    for step in range(steps):
        rows = [batch.to(job.device) for batch in batches(step)]
        counts = mesh.counts_tokens
        (targets,) = job.sum([sum(row.scored for row in rows) if counts else 0])
        engine.forward_backward(rows, max(1.0, targets), partial(autocast, job.device, config.train.precision))
        before = _weights(part, job)
        seen: dict[str, Tensor] = {}

        def look(norm: float, seen: dict[str, Tensor] = seen) -> bool:
            # Gradients are summed and clipped by now, and nothing is updated yet.
            seen |= {name: whole.tensor for name, whole in assemble(gradients(part), job).items()}
            return False

        engine.step(lr, look)
        after = _weights(part, job)
        if witness is not None:
            witness.step(before, seen, after, lr)
    return [] if witness is None else list(witness.lines.values())


def _weights(part: nn.Module, job: Processes) -> dict[str, Tensor]:
    """Whole weights by name, on the first rank. Collective."""
    parameters = {name for name, _ in named_parameters(part)}
    tensors = ((name.removeprefix("model/"), tensor) for name, tensor in model_tensors(part).items())
    return {
        name: whole.tensor for name, whole in assemble(((n, t) for n, t in tensors if n in parameters), job).items()
    }


class _Witness:
    """One rank that takes the same steps: with the run's own optimizer on the whole model, and with the formulas."""

    def __init__(self, config: RunConfig, model: Decoder):
        self.config = config.optimizer
        self.model = Decoder(config.model)
        self.optimizer = config.optimizer.factory(self.model)(self.model)
        named = self.config if isinstance(self.config, MuonConfig) else None
        self.bf16 = named is not None and named.precision == "bf16"
        self.iteration = "tuned" if named is None else named.iteration
        described = {} if named is None else describe(self.model, named.per_head)
        self.plain = Plain(self.config, self.model, described)
        self.lines = {name: Line(name) for name, _ in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    @torch.no_grad()
    def step(self, before: dict[str, Tensor], seen: dict[str, Tensor], after: dict[str, Tensor], lr: float) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(before[name])
            parameter.grad = seen[name].to(parameter.dtype).clone() if name in seen else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for name, parameter in self._parameters():
            line = self.lines[name]
            if name not in seen:
                line.rule = "no gradient"
                if not torch.equal(before[name], after[name]):
                    line.complain("was updated without a gradient")
                continue
            expected = self.plain.step(name, before[name], seen[name], lr)
            line.rule = expected.rule
            if expected.rule == "muon" and not expected.directions:
                line.complain("is a matrix, but is not described as one")
            judge(line, before[name], after[name], parameter.detach(), expected, self.bf16, self.iteration)
