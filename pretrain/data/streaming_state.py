"""The streamed sources of a loader: which lane a sequence is in, who reads it, and where all lanes stand.

Sequence n of a source in a run of stages is window n // V of lane n % V, of V lanes. So the order of tokens does not depend
on who reads which sequences. A rank knows the positions of lanes that it has read, and for others those in the state that it
was given: any position of a lane at or before the window wanted will do, the windows between are read and left. A state is
therefore right with the positions of one rank only, and quick to go on from with those of all of them: see `joined`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.stream import Reference
from pretrain.data.streaming import TextSource
from pretrain.data.streaming_lane import Position, Recipe, Window, places
from pretrain.data.streaming_readers import Here, Key, Processes, Readers, Recipes

AHEAD = 2  # steps that processes read in advance
_LENGTH_AT_A_TIME = 1 << 18  # bytes of windows of one lane that wait, at most

State = dict[str, Any]
Positions = dict[Key, Position]


class Streams:
    """sources: by their index among the loader's. lengths: of sequences, by run of stages. batch: of the first steps, and the
    largest. processes: that read lanes; 0 reads in this one. Close it in the end.
    """

    def __init__(
        self,
        sources: Mapping[int, TextSource],
        lengths: Mapping[int, int],
        batch: tuple[int, int],
        seed: int,
        processes: int = 0,
    ) -> None:
        self.sources, self._lengths, self._batch, self._seed = dict(sources), dict(lengths), batch, seed
        self._count = processes
        self.lanes = {index: source.lanes_for(batch[0]) for index, source in self.sources.items()}
        self._readers: Readers | None = None
        self.bad = 0  # rows left out in what was handed out
        self._base: Positions = {}  # of the state that was given
        self._at: Positions = {}  # behind what was handed out
        self._read: dict[int, list[tuple[Key, Window]]] = {}  # by step, until that is handed out

    def _recipes(self) -> Recipes:
        return {
            (run, index): Recipe(
                source.units,
                source.tokenizer(),
                self.lanes[index],
                length,
                (self._seed, index, run),
                source.shuffle,
                source.held_out,
            )
            for run, length in self._lengths.items()
            for index, source in self.sources.items()
        }

    def _opened(self) -> Readers:
        # At the first window: before that a state may still bring another number of lanes.
        if self._readers is None:
            recipes = self._recipes()
            if self._count:
                fewest, longest = min(self.lanes.values()), max(self._lengths.values())
                ahead = min(-(-AHEAD * self._batch[1] // fewest), max(2, _LENGTH_AT_A_TIME // longest))
                self._readers = Processes(recipes, self._count, ahead)
            else:
                self._readers = Here(recipes)
        return self._readers

    def begin(self, step: int) -> None:
        """What is read from here on is for this step."""
        self._read[step] = []

    def window(self, step: int, reference: Reference) -> Window:
        """A sequence, for a step. Raises DataError."""
        lanes = self.lanes[reference.source]
        number, lane = divmod(reference.sequence, lanes)
        key = (reference.run, reference.source, lane)
        known = [Position(), self._base.get(key, Position()), self._at.get(key, Position())]
        since = max((each for each in known if each.number <= number), key=lambda each: each.number)
        found = self._opened().read(key, number, since)
        if step in self._read:
            self._read[step].append((key, found))
        return found

    def commit(self, step: int) -> None:
        """This step was handed out, and the state is the one after it."""
        for key, window in self._read.pop(step, []):
            self.bad += window.bad
            if window.after.number > self._at.get(key, Position()).number:
                self._at[key] = window.after
        for other in [number for number in self._read if number <= step]:
            del self._read[other]

    def state(self, run: int) -> State:
        """Plain values, for a checkpoint; of this run of stages and later ones."""
        newest = {**self._base, **self._at}
        rows = [[*key, *position] for key, position in sorted(newest.items()) if key[0] >= run]
        return {"lanes": {str(index): lanes for index, lanes in self.lanes.items()}, "positions": rows}

    def load(self, state: State) -> None:
        """Goes on from a state, which may be that of fewer or more ranks; {} is the beginning."""
        lanes = {index: source.lanes_for(self._batch[0]) for index, source in self.sources.items()}
        lanes |= {int(index): int(count) for index, count in state.get("lanes", {}).items()}
        if lanes != self.lanes:
            self.close()
            self.lanes = lanes
        self._base = {
            (int(run), int(source), int(lane)): Position(*map(int, position))
            for run, source, lane, *position in state.get("positions", [])
        }
        self._at, self._read = {}, {}

    def passes(self, run: int, source: int) -> float:
        """How often the lanes whose positions are known have gone through their units, on average."""
        newest = {**self._base, **self._at}
        count, lanes = self.sources[source].units.count, self.lanes[source]
        known = [
            at.epoch + at.place / places(count, lane, lanes)
            for (of, index, lane), at in newest.items()
            if (of, index) == (run, source)
        ]
        return sum(known) / len(known) if known else 0.0

    def describe(self, source: int) -> str:
        units, bad = self.sources[source].units, self.sources[source].units.bad
        left = f", {bad} files that cannot be opened left out" if bad else ""
        return f"tokenised on the fly, {units.count} units of text in {self.lanes[source]} lanes{left}"

    def close(self) -> None:
        if self._readers is not None:
            self._readers.close()
            self._readers = None


def joined(states: Sequence[State]) -> State:
    """The state of all ranks, which stand behind the same step: for each lane the position of the rank that read it last."""
    newest: dict[tuple[int, ...], list[int]] = {}
    for state in states:
        for row in state["positions"]:
            key = tuple(row[:3])
            if key not in newest or row[3] > newest[key][3]:
                newest[key] = row
    return {**states[0], "positions": [newest[key] for key in sorted(newest)]}


def batch_of(window: Window, masked: bool) -> Batch:
    """A window as a batch of one row: see pack_rows."""
    length = len(window.ids) - 1
    tokens, targets = window.ids[:-1].astype(np.int64), window.ids[1:].astype(np.int64)
    borders = np.array([0, length], np.int64)
    if masked:
        targets[window.begins - 1] = IGNORE
        borders = np.concatenate([borders[:1], window.begins[window.begins < length], borders[1:]])
    found = torch.from_numpy(tokens).unsqueeze(0), torch.from_numpy(targets).unsqueeze(0)
    return Batch(*found, torch.from_numpy(borders.astype(np.int32)))


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Several batches as one row."""
    starts = np.cumsum([0, *(batch.tokens.shape[1] for batch in batches)])
    borders = [batch.cu_seqlens[1:] + int(start) for start, batch in zip(starts, batches)]
    return Batch(
        torch.cat([batch.tokens for batch in batches], 1),
        torch.cat([batch.targets for batch in batches], 1),
        torch.cat([torch.zeros(1, dtype=torch.int32), *borders]),
        sum(batch.padding for batch in batches),
        sum(batch.damaged for batch in batches),
    )
