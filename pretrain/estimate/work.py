"""FLOPs of layers and of whole steps: what sublayers say of themselves (flops.py), summed over documents and ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from parallel.grid import Grid
from parallel.recompute import Mode
from pretrain.config import RunConfig
from pretrain.data.batch import IGNORE, Batch
from pretrain.estimate.flops import Documents, Forward, Work, documents
from pretrain.estimate.model import Kind, ModelCosts, Way
from pretrain.estimate.parameters import Cutting
from pretrain.estimate.trace import Measured, Traced
from pretrain.estimate.update import update_flops


def recomputed(kind: Kind, rows: Documents, way: Way, measured: Measured) -> float:
    """FLOPs that one layer's checkpointing computes again on one rank of a tensor-parallel group, which shares them out evenly.

    rows: documents that the group works on. measured: of as many tokens as they have.
    """
    if way.recompute == "none":
        return 0.0
    only = way.recompute if way.recompute in ("mixer", "ffn") else None
    forward = Forward.sum(kind.forward(length, only).times(length * count / way.cutting.tp) for length, count in rows)
    others = forward.every - measured.products  # recurrences and attention: what is no plain product
    if way.recompute == "selective" and not way.gpu:  # there attention's result is kept, too
        others -= forward.attention
    return measured.again + max(0.0, others)


class StepWork:
    """Counts the FLOPs of a run's steps from the documents in their batches."""

    def __init__(self, config: RunConfig, grid: Grid, gpu: bool, model: ModelCosts | None = None):
        self.model = model or ModelCosts.of(config)
        self.grid, self.length = grid, config.data.sequence_length
        found = self.model.matrices(self.model.layers, last=True)
        # The mean over pipeline stages, as all else here.
        self.update = update_flops(config.optimizer, found, grid.world, gpu)
        way = Way(Cutting.of(grid), "none", config.train.precision == "bf16", gpu)
        # The multi-token layer is never computed again.
        pairs = zip(self.model.layers, _modes(config, grid, len(self.model.layers)), strict=True)
        self.again = Counter((kind, replace(way, recompute=mode)) for kind, mode in pairs if mode != "none")
        self.traced: dict[tuple[Kind, Way], Traced] = {}
        # A layer that cannot be followed without values ends no run: what it computes again is not counted.
        with suppress(ValueError):
            self.traced = {(kind, way): kind.traced(self.model.width, self.length, way) for kind, way in self.again}

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
            for (kind, way), count in self.again.items():
                total += count * recomputed(kind, rows, way, self.traced[kind, way].measured(tokens))
        return total


def _modes(config: RunConfig, grid: Grid, layers: int) -> Sequence[Mode]:
    """How each layer of the whole model is recomputed, as a run does it (pretrain/train/layout.py)."""
    if config.train.memory_budget is None:
        return [config.train.recompute] * layers
    from pretrain.estimate.budget import choose  # which rests on this module

    return choose(config, grid).modes


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
