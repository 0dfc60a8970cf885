"""What every step of a run takes from the data: batch size, sequence length, blend and rope base, by tokens seen.

A stage is in force from the first step before which the run has seen so many tokens. What changes at a border:
  batch size      nothing else: sequences go on where they were
  weights         every source goes on with its own next sequence, in the proportions of the new weights
  length          sources are cut anew, so each begins a new pass (another shuffle) at that length: a "run" of stages
Everything here is arithmetic on the list of stages; nothing is replayed to find a step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pretrain.data.blend import Blend
from pretrain.data.config import DataConfig
from pretrain.data.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """tokens: from when on. batch: sequences a step. micro_batch: sequences a rank computes at a time. weights: of the
    sources. rope_theta: None for the model's own. run: how often the sequence length has changed before.
    """

    tokens: int
    batch: int
    micro_batch: int
    sequence_length: int
    weights: tuple[float, ...] = (1.0,)
    rope_theta: float | None = None
    run: int = 0

    @property
    def step_tokens(self) -> int:
        return self.batch * self.sequence_length


def stages_of(data: DataConfig, batch: int, micro_batch: int) -> list[Stage]:
    """The stages that a configuration describes. batch, micro_batch: what holds before any of them says otherwise.

    Raises ValueError for stages that do not ascend and for weights that are not one a source.
    """
    weights = tuple(source.weight for source in data.sources) or (1.0,)
    if not any(weights):
        raise UsageError("data.sources: all weights are 0; give one of them more")
    found = [Stage(0, batch, micro_batch, data.sequence_length, weights)]
    for number, given in enumerate(data.stages):
        last, name = found[-1], f"data.stages.{number}"
        if given.tokens <= last.tokens:
            raise UsageError(
                f"{name}.tokens = {given.tokens}: stages begin one after the other, at more than {last.tokens}"
            )
        changes = given.model_dump(exclude_none=True)
        if given.weights is not None:
            if len(given.weights) != len(weights) or not any(given.weights):
                raise UsageError(
                    f"{name}.weights = {given.weights}: give {len(weights)}, one for each source, not all 0"
                )
            changes["weights"] = tuple(given.weights)
        made = replace(last, **changes)
        longer = made.sequence_length != last.sequence_length
        found.append(replace(made, run=last.run + 1) if longer else made)
    return found


@dataclass(frozen=True)
class Place:
    """Where a run stands before a step, without what it passed over.

    tokens, sequences: seen so far. run: see Stage. counts: sequences of each source used in this run of stages. index:
    sequences used since the weights last changed, which were `weights`. passes: over each source, in earlier runs.
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    run: int = 0
    counts: tuple[int, ...] = (0,)
    index: int = 0
    weights: tuple[float, ...] = ()
    passes: tuple[float, ...] = field(default=())


@dataclass(frozen=True)
class Segment:
    """Steps on end that differ in nothing. begin: the place before the first. base: counts when its weights came."""

    stage: Stage
    begin: Place
    base: tuple[int, ...]
    blend: Blend

    def index(self, step: int) -> int:
        """The number, in the blend, of a step's first sequence."""
        return self.begin.index + (step - self.begin.step) * self.stage.batch

    def place(self, step: int) -> Place:
        """The place before a step of this segment, or before the one after its last."""
        steps = step - self.begin.step
        counts = tuple(base + more for base, more in zip(self.base, self.blend.counts(self.index(step))))
        return replace(
            self.begin,
            step=step,
            tokens=self.begin.tokens + steps * self.stage.step_tokens,
            sequences=self.begin.sequences + steps * self.stage.batch,
            counts=counts,
            index=self.index(step),
        )

    def sequence(self, index: int) -> tuple[int, int]:
        """(source, its sequence in this run of stages) of a sequence of the blend."""
        source, number = self.blend.at(index)
        return source, self.base[source] + number


class Timetable:
    """Step -> segment, from a place on. windows: (run, source) -> sequences of one pass, to count passes with."""

    def __init__(self, stages: Sequence[Stage], begin: Place, windows: dict[tuple[int, int], float]) -> None:
        sources = len(stages[0].weights)
        number = max(i for i, stage in enumerate(stages) if stage.tokens <= begin.tokens)
        if begin.run != stages[number].run or len(begin.counts) != sources:
            begin = replace(begin, run=stages[number].run, counts=(0,) * sources, weights=())
        if len(begin.passes) != sources:
            begin = replace(begin, passes=(0.0,) * sources)
        self.segments: list[Segment] = []
        while True:
            stage = stages[number]
            blend = Blend(stage.weights)
            if begin.weights == stage.weights:
                base = tuple(count - used for count, used in zip(begin.counts, blend.counts(begin.index)))
            else:
                base, begin = begin.counts, replace(begin, index=0, weights=stage.weights)
            segment = Segment(stage, begin, base, blend)
            self.segments.append(segment)
            if number + 1 == len(stages):
                break
            steps = -(-(stages[number + 1].tokens - begin.tokens) // stage.step_tokens)
            begin = segment.place(begin.step + steps)
            while number + 1 < len(stages) and stages[number + 1].tokens <= begin.tokens:
                number += 1  # past stages that are too short for a single step, too
            if stages[number].run != stage.run:
                passes = tuple(
                    before + count / windows.get((stage.run, source), float("inf"))
                    for source, (before, count) in enumerate(zip(begin.passes, begin.counts))
                )
                begin = replace(begin, run=stages[number].run, counts=(0,) * sources, weights=(), passes=passes)
        self._steps = [segment.begin.step for segment in self.segments]

    def at(self, step: int) -> Segment:
        """Raises ValueError for a step before the first of the run."""
        found = self.segments[max(bisect_right(self._steps, step) - 1, 0)]
        if step < 0 or found.index(step) < 0:
            raise UsageError(f"step {step} lies before the first sequence of this run")
        return found

    def end(self, step: int) -> float:
        """The first step of the segment after that of `step`; infinity if it is the last."""
        after = bisect_right(self._steps, step)
        return self._steps[after] if after < len(self._steps) else float("inf")

    def place(self, step: int) -> Place:
        return self.at(step).place(step)
