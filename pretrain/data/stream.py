"""The token stream of a run: step -> rows, a pure function of (sources, stages, seed) and of what was passed over.

Nothing here knows of ranks, processes or files: only of how long documents are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.best_fit import BestFit, Table
from pretrain.data.errors import UsageError
from pretrain.data.order import joined, past, past_all
from pretrain.data.packing import Arrangement, Concatenated, Row, Version1, require_tokens
from pretrain.data.stages import Place, Segment, Stage, Timetable

ORDER_VERSIONS = (1, 2)
Position = dict[tuple[int, int], int]
"""(run of stages, source) -> the number after that of the last sequence used."""


@dataclass(frozen=True)
class Reference:
    """A sequence of the run: number `sequence` of `source` in `run` (see Stage.run)."""

    run: int
    source: int
    sequence: int


class Stream:
    """starts: of each source, see Corpus; None of one that is streamed. packing: "concatenate" or "best_fit".
    version: of the token order. tables: of a best fit that is known, by run and source.

    Raises ValueError for sources too small for a sequence, and for what version 1 does not know.
    """

    def __init__(
        self,
        starts: Sequence[np.ndarray | None],
        stages: Sequence[Stage],
        seed: int,
        packing: str = "concatenate",
        version: int = 2,
        tables: Mapping[tuple[int, int], Table] | None = None,
    ) -> None:
        self.stages, self.seed, self.packing, self.version = list(stages), seed, packing, version
        self._starts = starts
        self.sources = len(starts)
        assert all(len(stage.weights) == self.sources for stage in stages)
        if version == 1 and not self.simple:
            raise UsageError("order version 1 knows one source, one sequence length and concatenation only")
        self._arrangements: dict[tuple[int, int], Arrangement] = {}
        self._tables = tables or {}
        for stage in stages:
            for ends in starts:
                if ends is not None:
                    require_tokens(int(ends[-1]), stage.sequence_length)
        self.skipped: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.begin(Place(counts=(0,) * self.sources))

    @property
    def simple(self) -> bool:
        """Whether version 1 could say it."""
        return (
            self.sources == 1
            and self._starts[0] is not None
            and self.packing == "concatenate"
            and all(stage.run == 0 for stage in self.stages)
        )

    def begin(self, place: Place) -> None:
        """Numbers steps from this place on."""
        windows = {
            (stage.run, source): float(self.arrangement(stage.run, source).windows_per_epoch)
            for stage in self.stages
            if self.stages[-1].run > 0 and stage.run < self.stages[-1].run
            for source in range(self.sources)
        }
        self.timetable = Timetable(self.stages, place, windows)

    def arrangement(self, run: int, source: int) -> Arrangement:
        """How a source is cut in a run of stages."""
        found = self._arrangements.get((run, source))
        if found is None:
            length = next(stage.sequence_length for stage in self.stages if stage.run == run)
            starts, key = self._starts[source], (self.seed, source, run)
            if starts is None:
                from pretrain.data.streaming_order import Unmeasured

                found = Unmeasured()
            elif self.version == 1:
                found = Version1(np.diff(starts), length, self.seed)
            elif self.packing == "best_fit":
                found = BestFit(starts, length, *key, known=self._tables.get((run, source)))
            else:
                found = Concatenated(starts, length, *key)
            self._arrangements[run, source] = found
        return found

    def references(self, step: int, numbers: Sequence[int]) -> list[Reference]:
        """Which sequences those are that step `step` uses at its places `numbers`, from 0 to its batch."""
        segment = self.timetable.at(step)
        first, run = segment.index(step), segment.begin.run
        found = []
        for number in numbers:
            source, sequence = segment.sequence(first + number)
            found.append(Reference(run, source, past(self.skipped.get((run, source), ()), sequence)))
        return found

    def sequences(self, step: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As references, of many, and of places beyond the step's batch too: (source, its sequence) of each, int64.

        What stands at those places are the next steps' sequences, up to the segment's last.
        """
        segment = self.timetable.at(step)
        sources, sequences = segment.blend.many(segment.index(step) + numbers)
        sequences += np.array(segment.base)[sources]
        for (run, source), skipped in self.skipped.items():
            if run == segment.begin.run:
                mine = np.flatnonzero(sources == source)
                sequences[mine] = past_all(skipped, sequences[mine])
        return sources, sequences

    def tables(self) -> dict[tuple[int, int], Table]:
        """Those of the best fits that have been made."""
        return {key: each.table for key, each in self._arrangements.items() if isinstance(each, BestFit)}

    def row(self, reference: Reference) -> Row:
        return self.arrangement(reference.run, reference.source).row(reference.sequence)

    def position(self, step: int) -> Position:
        """Where the order stands after `step` steps, in the present run of stages and those since `begin` before it."""
        found: Position = {}
        segments = [s for s in self.timetable.segments if s.begin.step <= step] or [self.timetable.at(step)]
        for segment, following in zip(segments, [*segments[1:], None]):
            end = step if following is None else following.begin.step
            for source, used in enumerate(self._counts(segment, end)):
                key = (segment.begin.run, source)
                found[key] = past(self.skipped.get(key, ()), used - 1) + 1
        return found

    def _counts(self, segment: Segment, step: int) -> tuple[int, ...]:
        self.timetable.at(step)  # refuses steps before the first
        return segment.place(step).counts

    def skip_to(self, step: int, position: Position) -> None:
        """Leaves out what comes next from step `step` on, up to `position`."""
        now = self.position(step)
        for key, end in position.items():
            skipped = self.skipped.get(key, [])
            # The next to be used: nothing that is skipped already belongs to a new span's beginning.
            used = now.get(key, 0)
            first = used if not skipped else _next(skipped, used)
            if first < end:
                self.skipped[key] = joined(skipped, first, end)

    def passes(self, step: int) -> list[float]:
        """How often each source has been gone through before a step."""
        place = self.timetable.place(step)
        return [
            before + count / self.arrangement(place.run, source).windows_per_epoch if count else before
            for source, (before, count) in enumerate(zip(place.passes, place.counts))
        ]

    def skipped_list(self) -> list[list[int]]:
        """Plain values: [first, end] for the first source at the first length, otherwise [first, end, source, run]."""
        return [
            [first, end] if key == (0, 0) else [first, end, key[1], key[0]]
            for key, spans in sorted(self.skipped.items())
            for first, end in spans
        ]

    def set_skipped(self, spans: Sequence[Sequence[int]]) -> None:
        self.skipped = {}
        for first, end, *where in spans:
            source, run = where or (0, 0)
            self.skipped.setdefault((int(run), int(source)), []).append((int(first), int(end)))

    def place_to(self, place: Place) -> dict[str, Any]:
        """A place as plain values, for a checkpoint."""
        return {
            "tokens": place.tokens,
            "run": place.run,
            "counts": list(place.counts),
            "index": place.index,
            "weights": list(place.weights),
            "passes": self.passes(place.step),
            "earlier_passes": list(place.passes),
        }


def _next(skipped: Sequence[tuple[int, int]], used: int) -> int:
    """The first number at or after `used` that no span holds."""
    for first, end in skipped:
        if first <= used < end:
            used = end
    return used
