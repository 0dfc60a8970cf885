"""The loader of a run in which some source is streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from pretrain.data.batch import Batch, pack_rows
from pretrain.data.loader import Loader
from pretrain.data.store import Corpus
from pretrain.data.stream import Reference
from pretrain.data.streaming import TextSource
from pretrain.data.streaming_lane import Window
from pretrain.data.streaming_state import Streams, batch_of, joined, side_by_side


class StreamingLoader(Loader):
    """As Loader, with TextSources among the sources.

    A step may be asked for at any time, but only those that follow the last one are read without reading others: a lane is
    read forward from where its position is known. workers: processes that read lanes, see streaming_readers; the thread
    that prepares the next step (prefetch) is there besides. What it says in `numbers` of epochs, and its state, is of the
    lanes that this rank has read: `whole` makes the state of all of them.
    """

    def __init__(self, corpora: Sequence[Corpus | TextSource], *, workers: int = 0, **options: Any) -> None:
        super().__init__(cast(Sequence[Corpus], corpora), **options)
        sources = {index: each for index, each in enumerate(corpora) if isinstance(each, TextSource)}
        stages = self.stream.stages
        lengths = {stage.run: stage.sequence_length for stage in stages}
        batches = stages[0].batch, max(stage.batch for stage in stages)
        self.texts = Streams(sources, lengths, batches, self.stream.seed, workers)

    def _read(self, step: int) -> list[Batch]:
        self.texts.begin(step)
        length = self.stage(step).sequence_length
        every = self.references(step, self.rank, self.ranks)
        found = [side_by_side([self._row(step, each, length) for each in references]) for references in every]
        return [batch.pin() for batch in found] if self.pin else found

    def _row(self, step: int, reference: Reference, length: int) -> Batch:
        if reference.source in self.texts.sources:
            return batch_of(self.texts.window(step, reference), self.masked)
        row = (reference.source, self.stream.row(reference))
        return pack_rows(self.corpora, [row], length, masked=self.masked, skip_bad=self.skip_bad)

    def windows(self, step: int) -> dict[Reference, Window]:
        """What the streamed sequences of a step hold, those of all ranks."""
        every = self.stream.references(step, range(self.stage(step).batch))
        return {each: self.texts.window(-1, each) for each in every if each.source in self.texts.sources}

    def batches(self, step: int) -> list[Batch]:
        found = super().batches(step)
        self.texts.commit(step)
        return found

    def state_at(self, step: int) -> dict[str, Any]:
        return {**super().state_at(step), "streams": self.texts.state(self.stage(step).run)}

    def whole(self, gather: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
        """state_dict with the positions of all ranks' lanes. gather: brings every rank's value to all of them; collective."""
        states = gather(self.state_dict())
        return {**states[0], "streams": joined([state["streams"] for state in states])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.texts.load(state.get("streams", {}))

    def beginning(self, step: int, tokens: int) -> dict[str, Any]:
        return {key: value for key, value in super().beginning(step, tokens).items() if key != "streams"}

    def passes(self, step: int) -> list[float]:
        run, found = self.stage(step).run, super().passes(step)
        return [self.texts.passes(run, i) if i in self.texts.sources else each for i, each in enumerate(found)]

    def numbers(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """As Loader's; besides, rows that this rank has left out as unreadable since it began."""
        found = {**super().numbers(step, batches), "epochs": self.passes(step)}
        return {**found, "damaged_rows": self.texts.bad} if self.texts.bad else found

    def describe(self) -> list[str]:
        lines = super().describe()
        for source, each in self.texts.sources.items():
            if len(self.corpora) == 1:
                lines.insert(0, f"source {each.prefix}: {self.texts.describe(source)}")
            else:
                lines[source] = f"{lines[source].rsplit(', ', 1)[0]}, {self.texts.describe(source)}"
        return lines

    def close(self) -> None:
        super().close()
        self.texts.close()
