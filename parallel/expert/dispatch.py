"""Dispatchers: bring tokens to the ranks that hold their experts, and the results home.

A dispatcher is called like kernels.experts.experts, but with this rank's share of the weights: tokens [N, D], gate_up [E, D, 2F],
down [E, F, D], indices int64 [N, k], scores [N, k] -> y [N, D]. `start`, called alike, launches the messages and returns at once.
What is computed before `.finish()` overlaps with them, in the forward pass and in the backward pass.

All ranks of a group call alike, also those without tokens. Dropless: N and the loads may differ freely. Scores travel with the
tokens, so the experts weigh their hidden activations as on one rank and the scores' gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.common.opaque import opaque
from kernels.experts import experts as local_experts
from kernels.experts import load
from parallel.expert.transport import Exchange, Gathering, announce
from parallel.expert.travel import Trip, back, combined, copies

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Pending:
    """A dispatch whose tokens are on their way."""

    def __init__(self, complete: Callable[[], Tensor]):
        self._complete = complete

    @opaque  # messages under way are nothing to put into a graph
    def finish(self) -> Tensor:
        """Waits, computes the experts, and brings the results home: y [N, D]. Call it once."""
        return self._complete()


class AllToAllExperts:
    """Expert parallelism (Lepikhin et al. 2020, arXiv 2006.16668): the i-th rank of the group holds the i-th E/ranks experts.

    Each choice travels as a row of its own: N * k rows in all, D and one fp32 weight wide, whatever their loads.
    inner: computes the experts of this rank on what arrived; another dispatcher (ExpertTensor) or the kernel.
    """

    def __init__(self, group: ProcessGroup, experts: int, inner: Experts = local_experts):
        self.group, self.experts, self.inner = group, experts, inner
        self.ranks = dist.get_world_size(group)
        if experts % self.ranks:
            raise ValueError(f"experts={experts} is not a multiple of the {self.ranks} ranks of the ep group")

    def __call__(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        return self.start(tokens, gate_up, down, indices, scores).finish()

    @opaque  # reads the loads: their sizes are the messages'
    def start(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Pending:
        own = self.experts // self.ranks
        if down.shape[0] != own:
            raise ValueError(
                f"{down.shape[0]} experts given, but each of {self.ranks} ranks holds {own} of {self.experts}"
            )
        order = torch.argsort(indices.reshape(-1), stable=True)  # stable: a fixed order
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        position = position.view_as(indices)

        # How many rows come from each rank for each expert here: rows come sorted, so this also says which expert each is for.
        counts = load(indices, self.experts).view(self.ranks, own)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.group)
        send, receive = torch.stack([counts.sum(1), coming.sum(1)]).tolist()
        expert = torch.arange(own, device=order.device).repeat(self.ranks)
        expert = expert.repeat_interleave(coming.flatten(), output_size=sum(receive))[:, None]

        transport = Exchange(self.group, send, receive)
        trip = Trip(transport, copies(tokens, order, position), scores.reshape(-1).index_select(0, order))

        def complete() -> Tensor:
            rows, weights = trip.arrive()
            out = self.inner(rows, gate_up, down, expert, weights[:, None])
            return combined(back(transport, out), order, position)

        return Pending(complete)


class ExpertTensor:
    """Tensor parallelism within the experts: each rank of the group holds every expert's share of the hidden width, F / ranks.

    gate_up [E, D, 2F/ranks], its share of the gate's columns first, then of up's; down [E, F/ranks, D]. The ranks hold different
    tokens, so all tokens are gathered, and the partial sums reduce-scattered (Korthikanti et al. 2022, arXiv 2205.05198).
    """

    def __init__(self, group: ProcessGroup, inner: Experts = local_experts):
        self.group, self.inner = group, inner
        self.rank = dist.get_rank(group)

    def __call__(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        return self.start(tokens, gate_up, down, indices, scores).finish()

    @opaque
    def start(self, tokens: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, scores: Tensor) -> Pending:
        transport = Gathering(self.group, announce(tokens.shape[0], self.group, tokens.device), self.rank)
        chosen = transport.there(indices)
        trip = Trip(transport, tokens, scores)

        def complete() -> Tensor:
            every, weights = trip.arrive()
            return back(transport, self.inner(every, gate_up, down, chosen(), weights))

        return Pending(complete)
