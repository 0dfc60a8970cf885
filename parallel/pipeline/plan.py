"""Which layers form which stage, which rank holds it, and how many micro-batches its schedule needs. Arithmetic only.

Stages are numbered along the model. With several stages a rank (virtual stages), stage s is held by pipeline rank

    s mod pp                                                    interleaved (Narayanan et al. 2021, arXiv 2104.04473)
    0, 1, ..., pp - 1, pp - 1, ..., 1, 0                        zbv, in the shape of a V (Qi et al. 2024, arXiv 2401.10241)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from parallel.pipeline.cut import cut

ScheduleName = Literal["1f1b", "interleaved", "zbv"]


@dataclass(frozen=True)
class Plan:
    """layers: of each stage, in order. ranks: pipeline-parallel ranks."""

    schedule: ScheduleName
    ranks: int
    layers: tuple[range, ...]

    @classmethod
    def of(
        cls,
        schedule: ScheduleName,
        ranks: int,
        costs: Sequence[float],
        first_extra: float = 0.0,
        last_extra: float = 0.0,
        virtual: int | None = None,
        counts: Sequence[int] | None = None,
    ) -> Plan:
        """costs, first_extra, last_extra: see `cut`. virtual: stages a rank. counts: layers of each stage instead of a cut.

        Raises ValueError, naming the field of the mesh section, for what does not fit.
        """
        virtual = virtual or (1 if schedule == "1f1b" else 2)
        if schedule == "1f1b" and virtual != 1:
            raise ValueError(
                f"mesh.pp_virtual={virtual}: mesh.pp_schedule=1f1b has one stage a rank; "
                "leave mesh.pp_virtual out, or set mesh.pp_schedule=interleaved"
            )
        if schedule == "interleaved" and virtual < 2:
            raise ValueError(
                "mesh.pp_virtual=1: mesh.pp_schedule=interleaved needs two stages a rank or more; "
                "raise mesh.pp_virtual, or set mesh.pp_schedule=1f1b"
            )
        if schedule == "zbv" and virtual != 2:
            raise ValueError(
                f"mesh.pp_virtual={virtual}: mesh.pp_schedule=zbv has two stages a rank; leave mesh.pp_virtual out"
            )
        stages = ranks * virtual
        if counts is None:
            return cls(schedule, ranks, tuple(cut(costs, stages, first_extra, last_extra)))
        if len(counts) != stages or sum(counts) != len(costs) or min(counts) < 0:
            raise ValueError(
                f"mesh.pp_layers={list(counts)}: give {stages} numbers (mesh.pp={ranks} x {virtual} stages a rank) "
                f"that add up to the model's {len(costs)} layers"
            )
        return cls(
            schedule, ranks, tuple(itertools.starmap(range, itertools.pairwise(itertools.accumulate([0, *counts]))))
        )

    @property
    def stages(self) -> int:
        return len(self.layers)

    def holder(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        lap, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.schedule == "zbv" and lap % 2 else place

    def held_by(self, rank: int) -> list[int]:
        """The stages of a pipeline rank, in order."""
        return [stage for stage in range(self.stages) if self.holder(stage) == rank]

    def check(self, micro_batches: int) -> None:
        """Raises ValueError unless the schedule can run this many micro-batches a step."""
        way = "change train.micro_batch or train.batch"
        if self.schedule == "1f1b" and micro_batches < self.ranks:
            raise ValueError(
                f"mesh.pp={self.ranks}, mesh.pp_schedule=1f1b: at least {self.ranks} micro-batches a step are needed, "
                f"but there are {micro_batches}; lower train.micro_batch or raise train.batch"
            )
        rounds = max(1, micro_batches // self.ranks)
        if self.schedule == "interleaved" and micro_batches % rounds:
            near = [n for n in range(1, 2 * micro_batches + 1) if n % max(1, n // self.ranks) == 0]
            below, above = max(n for n in near if n < micro_batches), min(n for n in near if n > micro_batches)
            raise ValueError(
                f"mesh.pp={self.ranks}, mesh.pp_schedule=interleaved: {micro_batches} micro-batches a step cannot go through "
                f"in rounds of at least {self.ranks}; {below} or {above} could, so {way}"
            )
