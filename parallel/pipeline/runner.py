"""Running a pipeline: one step's micro-batches forward and backward by a schedule, or one batch forward.

The schedules are torch's (torch.distributed.pipelining). What a module must offer to be a stage ("part"):

    part(received, tokens, targets=, cu_seqlens=)   -> tensors for the next stage, from the last one the summed loss
    part.incoming(length), part.outgoing(length)    examples of these tensors on the meta device, for a stream of `length` tokens
    part.shared()                                   {name: parameter} of which the first and the last stage hold a copy each
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh
from parallel.pipeline.deferred import WeightGradients
from parallel.pipeline.plan import Plan
from parallel.pipeline.stage import Context, MicroBatch, Stage, call


class PipelineRunner:
    """The stages of this rank. Every rank of a pipeline makes the same calls with the same batches."""

    def __init__(self, parts: Sequence[nn.Module], plan: Plan, mesh: Mesh):
        """parts: the modules of the stages plan.held_by(pp rank), in order, sharded and moved to their device already.

        Their gradients must be sums over ranks, where an engine reduces them, not means.
        """
        assert mesh.size("pp") == plan.ranks > 1
        self.plan, self.group = plan, mesh.group("pp")
        self.ranks, self.device = mesh.ranks("pp"), mesh.processes.device
        self.stream_parts = mesh.size("tp")  # between sublayers each tp rank holds its part of the tokens
        self.parts: dict[int, Any] = dict(zip(plan.held_by(mesh.rank("pp")), parts, strict=True))
        self._ready: tuple[tuple[int, int], list[Stage], Any] | None = None
        self._denominator = 1.0
        self._context: Context = nullcontext
        self.deferred = {i: WeightGradients(part) for i, part in self.parts.items()} if plan.schedule == "zbv" else {}

    def forward_backward(
        self, batches: Sequence[MicroBatch], denominator: float, context: Context = nullcontext
    ) -> Tensor:
        """Adds the gradients of sum(losses) / denominator to all parameters; `sum_shared_gradients` is still to come.

        batches: the step's micro-batches, each a row of the same number of tokens. context: entered around every forward pass,
        for autocast. Returns this rank's share of sum(losses) / denominator, fp64: 0 on ranks without the last stage, so that the
        sum over ranks is the whole. Raises ValueError when the schedule cannot run this many micro-batches, or their lengths
        differ.
        """
        self.plan.check(len(batches))
        lengths = {batch.tokens.shape[1] for batch in batches}
        if len(lengths) > 1:
            raise ValueError(f"micro-batches of {sorted(lengths)} tokens: a pipeline needs them all of one length")
        stages, schedule = self._prepare(len(batches), lengths.pop())
        for stage in stages:
            stage.begin(batches)
        self._denominator, self._context = denominator, context
        losses: list[Tensor] = []
        # The losses need no targets from the schedule, but it counts them.
        schedule._step_microbatches(target_mbs=[None] * len(batches), losses=losses)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """The summed loss of one batch in nats, fp64: 0 on ranks without the last stage. Ranks do not wait for later stages.

        For autocast, call it under that.
        """
        length = batch.tokens.shape[1] // self.stream_parts
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        passed: tuple[Tensor, ...] = ()
        for index, part in self.parts.items():
            source = self.plan.holder(index - 1) if index else None
            received = passed
            if index - 1 not in self.parts:
                received = tuple(torch.empty_like(like, device=self.device) for like in part.incoming(length))
                for tensor in received:
                    dist.recv(tensor, self.ranks[source or 0], self.group)
            output = call(part, received, batch, nullcontext)
            if index == self.plan.stages - 1:
                total += output
            elif index + 1 in self.parts:
                passed = output
            else:
                for tensor in output:
                    dist.send(tensor, self.ranks[self.plan.holder(index + 1)], self.group)
        return total

    def copies(self) -> dict[str, int]:
        """How many stages hold a parameter, for those of this rank that more than one holds: GradientRule's `stages`."""
        return {name: 2 for part in self.parts.values() for name in part.shared()}

    def gather(self, values: dict[str, Any]) -> dict[str, Any]:
        """Named values of the layers of this rank -> those of all layers, on every rank. Collective over the pipeline."""
        found: list[Any] = [None] * self.plan.ranks
        dist.all_gather_object(found, values, self.group)
        return {name: value for part in found for name, value in part.items()}

    def _prepare(self, micro_batches: int, tokens: int) -> tuple[list[Stage], Any]:
        """torch's stages and schedule, which are for one number of micro-batches of one length."""
        key = (micro_batches, tokens)
        if self._ready is None or self._ready[0] != key:
            length = tokens // self.stream_parts
            stages = [
                Stage(part, i, self.plan.stages, self.device, self.group, length, self._enter, self.deferred.get(i))
                for i, part in self.parts.items()
            ]
            options: dict[str, Any] = {"loss_fn": self._scaled, "scale_grads": False}
            schedule: Any
            if self.plan.schedule == "1f1b":
                schedule = Schedule1F1B(stages[0], micro_batches, **options)
            elif self.plan.schedule == "interleaved":
                schedule = ScheduleInterleaved1F1B(list(stages), micro_batches, **options)
            else:
                schedule = ScheduleZBVZeroBubble(list(stages), micro_batches, **options)
            self._ready = (key, stages, schedule)
        return self._ready[1], self._ready[2]

    def _enter(self) -> AbstractContextManager[Any]:
        return self._context()

    def _scaled(self, loss: Tensor, _: None) -> Tensor:
        return loss / self._denominator

    @torch.no_grad()
    def sum_shared_gradients(self) -> None:
        """Gives both copies of a shared parameter the sum of their gradients, bit by bit the same.

        Comes after all sums within the stages, which may add up in another order in each of them: copies would drift apart.
        """
        first, last = self.parts.get(0), self.parts.get(self.plan.stages - 1)
        if first is not None and last is not None:
            for ours, theirs in zip(first.shared().values(), last.shared().values(), strict=True):
                _gradient(ours).add_(_gradient(theirs))
                _gradient(theirs).copy_(_gradient(ours))
            return
        one, other = (first, self.plan.stages - 1) if first is not None else (last, 0)
        if one is not None:
            peer = self.ranks[self.plan.holder(other)]
            for parameter in one.shared().values():
                self._add_from(peer, _gradient(parameter))

    def _add_from(self, peer: int, ours: Tensor) -> None:
        theirs = torch.empty_like(ours)
        operations = [
            dist.P2POp(dist.isend, ours.contiguous(), peer, self.group),
            dist.P2POp(dist.irecv, theirs, peer, self.group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        ours.add_(theirs)  # a + b on one rank, b + a on the other: equal


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
