"""FLOPs of layers and of whole steps: what sublayers say of themselves (flops.py), summed over documents and ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from parallel.grid import Grid
from pretrain.config import RunConfig
from pretrain.data.batch import IGNORE, Batch
from pretrain.estimate.flops import Documents, Forward, Work, documents
from pretrain.estimate.model import Kind, ModelCosts, Way
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.trace import Traced
from pretrain.estimate.update import update_flops


def recomputed(kind: Kind, rows: Documents, way: Way, products: float, again: float) -> float:
    """FLOPs that one layer's checkpointing computes again on one rank of a tensor-parallel group, which shares them out evenly.

    rows: documents that the group works on. products, again: FLOPs of matrix products in their forward pass on this rank, and
    of those that are made once more (trace.py).
    """
    if way.recompute == "none":
        return 0.0
    forward = Forward.sum(kind.forward(length).times(length * count / way.cutting.tp) for length, count in rows)
    others = forward.every - products  # recurrences and attention: what is no plain product
    if way.recompute == "selective" and not way.gpu:  # there attention's result is kept, too
        others -= forward.attention
    return again + max(0.0, others)


class StepWork:
    """Counts the FLOPs of a run's steps from the documents in their batches."""

    def __init__(self, config: RunConfig, grid: Grid, gpu: bool, model: ModelCosts | None = None):
        self.model = model or ModelCosts.of(config)
        self.way = Way(Cutting.of(grid), config.train.recompute, config.train.precision == "bf16", gpu)
        self.grid, self.length = grid, config.data.sequence_length
        found = self.model.matrices(self.model.layers, last=True)
        # The mean over pipeline stages, as all else here.
        self.update = update_flops(config.optimizer, found, grid.world, gpu)
        self.counts = Counter(self.model.layers)
        self.traced: dict[Kind, Traced] = {}
        if self.way.recompute != "none":  # the multi-token layer is never computed again
            # A layer that cannot be followed without values ends no run: what it computes again is not counted.
            with suppress(ValueError):
                self.traced = {kind: kind.traced(self.model.width, self.length, self.way) for kind in self.counts}

    def of(self, batches: Sequence[Batch]) -> Work:
        """FLOPs of a step: the mean of the ranks that work on these micro-batches together."""
        scored, idle = _lengths(batches)
        ranks = self.grid.pp * self.grid.cp * self.grid.tp
        useful, filling = (self._forward(rows) for rows in (scored, idle))
        return Work(
            useful=useful.training / ranks,
            idle=filling.training / ranks,
            recomputed=self._recomputed(batches) / self.grid.pp,
            remade=(useful.remade + filling.remade) / ranks,
            update=self.update,
        )

    def _forward(self, rows: Documents) -> Forward:
        return Forward.sum(self.model.forward(length).times(length * count) for length, count in rows)

    def _recomputed(self, batches: Sequence[Batch]) -> float:
        """On one rank, were it to have all layers."""
        total = 0.0
        for batch in batches if self.traced else ():
            every = documents(batch.cu_seqlens.diff().tolist())
            rows = tuple((length, count / self.grid.cp) for length, count in every)
            tokens = batch.tokens.numel() // self.grid.cp
            for kind, count in self.counts.items():
                measured = self.traced[kind].measured(tokens)
                total += count * recomputed(kind, rows, self.way, measured.products, measured.again)
        return total


def _lengths(batches: Sequence[Batch]) -> tuple[Documents, Documents]:
    """The documents of packed rows: (those in which something is predicted, others: padding and single tokens)."""
    scored: list[int] = []
    idle: list[int] = []
    for batch in batches:
        predicted = (batch.targets.flatten() != IGNORE).cumsum(0)
        lengths = batch.cu_seqlens.diff()
        ends: Tensor = predicted[batch.cu_seqlens[1:].long() - 1]
        starts = ends.roll(1)
        starts[0] = 0
        for length, some in zip(lengths.tolist(), (ends > starts).tolist()):
            (scored if some else idle).append(length)
    return documents(scored), documents(idle)
