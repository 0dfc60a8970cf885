"""Training batches: a global step's sequences, divided among data-parallel ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import xxhash

from pretrain.data.batch import Batch, pack_rows
from pretrain.data.best_fit import Table
from pretrain.data.errors import UsageError
from pretrain.data.packing import Arrangement
from pretrain.data.reading import Reader
from pretrain.data.stages import Place, Stage
from pretrain.data.store import Corpus
from pretrain.data.stream import ORDER_VERSIONS, Position, Reference, Stream
from pretrain.data.tokenizer_check import same_tokenizer
from pretrain.data.workers import Workers

__all__ = ["Batch", "Loader"]


class Loader:
    """Micro-batches of one data-parallel rank, by global step.

    Step s consumes `global_batch` consecutive sequences of the order. Micro-batch m of rank r holds sequences (m *
    ranks + r) * micro_batch + [0, micro_batch) of them, so the set of sequences in a step, and their order through
    micro-batches and ranks, is the same for any number of ranks. `skipped` spans of the order are passed over, whatever the
    step: sequences are counted without them.

    corpus: one source, or several that the stages blend by weight. global_batch: sequences per step over all ranks.
    micro_batch: sequences per micro-batch. stages: what changes as tokens are seen (see stages.Stage), in place of
    sequence_length, global_batch and micro_batch. packing, masked, skip_bad: see DataConfig. version: of the order of a
    run that begins; a state that is loaded brings its own. prefetch: prepare the next step on a thread. workers:
    processes that read ahead instead. pin: hand batches out in page-locked memory. tables: see Stream.

    Raises ValueError if a global_batch does not divide by ranks * micro_batch, DataError for damaged data when a batch
    is read.
    """

    def __init__(
        self,
        corpus: Corpus | Sequence[Corpus],
        *,
        sequence_length: int = 0,
        global_batch: int = 0,
        micro_batch: int = 0,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        prefetch: bool = False,
        stages: Sequence[Stage] = (),
        packing: str = "concatenate",
        masked: bool = True,
        version: int = 2,
        skip_bad: bool = False,
        pin: bool = False,
        workers: int = 0,
        tables: Mapping[tuple[int, int], Table] | None = None,
    ) -> None:
        self.corpora = [corpus] if isinstance(corpus, Corpus) else list(corpus)
        stages = list(stages) or [Stage(0, global_batch, micro_batch, sequence_length)]
        for stage in stages:
            _check(stage, rank, ranks)
        same_tokenizer(self.corpora)
        self._recipe, self._tables = (stages, seed, packing), tables
        self.stream = self._stream(version)
        self.rank, self.ranks = rank, ranks
        self.masked, self.skip_bad, self.pin = masked, skip_bad, pin
        self._reader = self._new_reader()
        self._next_step = self._base = 0  # steps are numbered from `_base` on
        self.damaged = 0
        self._workers: Workers | None = None
        if workers:
            ways: dict[str, Any] = {"stages": stages, "seed": seed, "packing": packing, "masked": masked}
            ways |= {"rank": rank, "ranks": ranks, "skip_bad": skip_bad}
            if packing == "best_fit":
                for source in range(len(self.corpora)):
                    self.stream.arrangement(stages[0].run, source)
                ways["tables"] = self.stream.tables()  # so that not each worker packs the corpus again
            self._workers = Workers(partial(_reader, self.corpora, ways), workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch and not workers else None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def _stream(self, version: int) -> Stream:
        stages, seed, packing = self._recipe
        starts = [None if each.streamed else each.starts for each in self.corpora]
        return Stream(starts, stages, seed, packing, version, self._tables)

    def _new_reader(self) -> Reader | None:
        """None where a source is streamed: what comes next is not known before it has been read."""
        if any(each.streamed for each in self.corpora):
            return None
        return Reader(self.stream, self.corpora, self.rank, self.ranks, self.masked)

    @property
    def corpus(self) -> Corpus:
        """The first source."""
        return self.corpora[0]

    @property
    def fingerprint(self) -> str:
        """Names the text of all sources, in their order."""
        names = [each.fingerprint for each in self.corpora]
        return names[0] if len(names) == 1 else xxhash.xxh3_128("\n".join(names).encode()).hexdigest()

    @property
    def order(self) -> Arrangement:
        """How the first source is cut at the first length."""
        return self.stream.arrangement(0, 0)

    @property
    def skipped(self) -> list[list[int]]:
        """Spans that are passed over: [first, end] of sequence numbers, with source and run of stages where there are others."""
        return self.stream.skipped_list()

    @skipped.setter
    def skipped(self, spans: Sequence[Sequence[int]]) -> None:
        self._drop_ahead()
        if self._reader is not None:
            self._reader.forget()
        self.stream.set_skipped(spans)

    def stage(self, step: int) -> Stage:
        """What a step takes: batch, length, weights."""
        return self.stream.timetable.at(step).stage

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the first stage's steps on each rank (gradient accumulation steps)."""
        stage = self.stream.stages[0]
        return stage.batch // (self.ranks * stage.micro_batch)

    @property
    def steps_per_epoch(self) -> float:
        """Global steps that one pass over the first source lasts, if all sequences are its own."""
        return self.order.windows_per_epoch / self.stream.stages[0].batch

    def first_sequence(self, step: int) -> int:
        """Sequences that the run has used before a global step."""
        return self.stream.timetable.place(step).sequences

    def tokens(self, step: int) -> int:
        """Tokens (positions) that the run has used before a global step."""
        return self.stream.timetable.place(step).tokens

    def passes(self, step: int) -> list[float]:
        """How often the run has gone through each source before a global step."""
        return self.stream.passes(step)

    def numbers(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """For the metrics of finished step number `step`: passes over sources, and this rank's padding and damage."""
        found: dict[str, Any] = {}
        if len(self.corpora) > 1:
            found["epochs"] = self.passes(step)
        if self.stream.packing == "best_fit" or self.skip_bad:
            positions = sum(batch.tokens.numel() for batch in batches)
            found["padding"] = sum(batch.padding for batch in batches) / positions
        if self.damaged:
            found["damaged_tokens"] = self.damaged
        return found

    def describe(self) -> list[str]:
        """Lines for the start of a run, on what is not plain concatenation of one source."""
        lines = []
        run = self.stage(self._next_step).run
        for source, corpus in enumerate(self.corpora if len(self.corpora) > 1 else []):
            windows, weight = (
                self.stream.arrangement(run, source).windows_per_epoch,
                self.stage(self._next_step).weights,
            )
            share = weight[source] / sum(weight)
            lines.append(f"source {corpus.prefix}: {share:.1%} of the sequences, {windows} of them in a pass")
        if self.stream.packing == "best_fit":
            shares = [self.stream.arrangement(run, source).padding for source in range(len(self.corpora))]
            lines.append(f"best-fit packing: {', '.join(f'{share:.2%}' for share in shares)} padding")
        return lines

    def position(self, step: int) -> Position:
        """Where the order stands after `step` steps of this run: the number after that of the last sequence used."""
        return self.stream.position(step)

    def skip_to(self, position: Position) -> None:
        """Leaves out what comes next, up to `position`, in this run and in those that load its state."""
        self._drop_ahead()
        if self._reader is not None:
            self._reader.forget()
        self.stream.skip_to(self._next_step, position)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`, in the order in which to run them. Any step may be asked
        for at any time.
        """
        if self._ahead is not None and self._ahead[0] == step:
            future, self._ahead = self._ahead[1], None
            found = future.result()
        else:
            self._drop_ahead()
            found = self._read(step) if self._workers is None else self._from_workers(step, self._workers)
        self._next_step = step + 1
        if self._thread is not None:
            self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        self.damaged += sum(batch.damaged for batch in found)
        return found

    def _from_workers(self, step: int, workers: Workers) -> list[Batch]:
        self.stream.timetable.at(step)  # refused here, not in a worker
        found = workers.read(step, {**self.state_at(self._base), "skipped": self.skipped})
        return [batch.pin() for batch in found] if self.pin else found

    def references(self, step: int, rank: int, ranks: int) -> list[list[Reference]]:
        """The sequences of each micro-batch of a step on one of so many ranks."""
        stage = self.stage(step)
        starts = range(rank * stage.micro_batch, stage.batch, ranks * stage.micro_batch)
        return [self.stream.references(step, range(start, start + stage.micro_batch)) for start in starts]

    def _read(self, step: int) -> list[Batch]:
        found = self._reader.read(step) if self._reader is not None else None
        if found is None:
            length = self.stage(step).sequence_length
            found = [self._pack(references, length) for references in self.references(step, self.rank, self.ranks)]
        return [batch.pin() for batch in found] if self.pin else found

    def _pack(self, references: Sequence[Reference], length: int) -> Batch:
        rows = [(reference.source, self.stream.row(reference)) for reference in references]
        return pack_rows(self.corpora, rows, length, masked=self.masked, skip_bad=self.skip_bad)

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands after the last step handed out; the same on all ranks, plain values only."""
        return self.state_at(self._next_step)

    def state_at(self, step: int) -> dict[str, Any]:
        """As state_dict, had the last step handed out been `step` - 1."""
        place = self.stream.timetable.place(step)
        state = {
            "order_version": self.stream.version,
            "corpus": self.fingerprint,
            "seed": self.stream.seed,
            "sequence_length": self.stream.stages[0].sequence_length,
            "packing": self.stream.packing,
            "step": step,
            "sequences": place.sequences,
            "skipped": self.skipped,
        }
        if len(self.corpora) > 1 or len(self.stream.stages) > 1:
            state["place"] = self.stream.place_to(place)
        return state

    def changed(self, state: dict[str, Any]) -> str | None:
        """The first thing for which the same tokens would not follow `state`; None if they would."""
        mine, saved = self.state_dict(), {"packing": "concatenate", **state}
        for key in ("corpus", "seed", "sequence_length", "packing"):
            if saved.get(key) != mine[key]:
                return key
        version = saved.get("order_version")
        return None if version in ORDER_VERSIONS and (version != 1 or self.stream.simple) else "order_version"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last step of the run that saved `state`; ranks, micro_batch and global_batch may differ
        from that run's, and stages from the one in force on.

        Raises ValueError if the corpus, seed, sequence_length, packing or the order's version differ: the same tokens
        would not follow.
        """
        causes = {
            "corpus": "point `data.path` at the corpus that the checkpoint was trained on",
            "seed": "set the data seed to the checkpoint's",
            "sequence_length": "set `sequence_length` to the checkpoint's",
            "packing": "set `data.packing` to the checkpoint's",
            "order_version": "use the release that wrote the checkpoint",
        }
        key = self.changed(state)
        if key is not None:
            where = f" ({self.corpus.prefix})" if key == "corpus" else ""
            raise UsageError(
                f"cannot continue the data order: the checkpoint has {key} {state.get(key)!r}, "
                f"this run has {self.state_dict()[key]!r}{where}; {causes[key]}, or start a new run"
            )
        self._drop_ahead()
        if state["order_version"] != self.stream.version:
            self.stream = self._stream(state["order_version"])
        self.stream.begin(_place(state))
        self.stream.set_skipped(state.get("skipped", []))
        self._reader = self._new_reader()
        self._next_step = self._base = int(state["step"])

    def beginning(self, step: int, tokens: int) -> dict[str, Any]:
        """The state of a run that begins a new order after so many steps and tokens."""
        state = {**self.state_dict(), "step": step, "sequences": 0, "skipped": []}
        if "place" in state:
            state["place"] = {"tokens": tokens, "run": -1, "counts": [], "index": 0, "weights": []}
        return state

    def _drop_ahead(self) -> None:
        # The thread must be done before the numbering and the order's tables, which it reads, are used from here.
        if self._ahead is not None:
            future, self._ahead = self._ahead[1], None
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """Ends the prefetch thread and the workers."""
        self._drop_ahead()
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


def _reader(corpora: list[Corpus], ways: dict[str, Any]) -> Callable[[dict[str, Any], int], list[Batch]]:
    """What reads in a worker: a loader of the same kind, brought to the state that it is given."""
    loader = Loader(corpora, **ways)
    at: dict[str, Any] = {}

    def read(state: dict[str, Any], step: int) -> list[Batch]:
        nonlocal at
        if state != at:
            loader.load_state_dict(state)
            at = state
        return loader._read(step)

    return read


def _place(state: dict[str, Any]) -> Place:
    sequences = int(state["sequences"])
    plain = {"tokens": sequences * int(state["sequence_length"]), "run": 0, "counts": [sequences], "index": sequences}
    place = state.get("place") or {**plain, "weights": [1.0]}
    return Place(
        step=int(state["step"]),
        tokens=int(place["tokens"]),
        sequences=sequences,
        run=int(place["run"]),
        counts=tuple(int(count) for count in place["counts"]),
        index=int(place["index"]),
        weights=tuple(float(weight) for weight in place["weights"]),
        passes=tuple(float(passed) for passed in place.get("earlier_passes", ())),
    )


def _check(stage: Stage, rank: int, ranks: int) -> None:
    global_batch, micro_batch = stage.batch, stage.micro_batch
    if min(global_batch, micro_batch, ranks) < 1:
        raise UsageError(
            f"global_batch ({global_batch}), micro_batch ({micro_batch}) and ranks ({ranks}) must be at least 1"
        )
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} is not one of {ranks} data-parallel ranks")
    if global_batch % (ranks * micro_batch):
        unit = ranks * micro_batch
        near = sorted({max(unit, global_batch // unit * unit), (global_batch // unit + 1) * unit})
        when = f" from {stage.tokens} tokens on" if stage.tokens else ""
        raise UsageError(
            f"global_batch {global_batch}{when} does not divide by {ranks} data-parallel ranks x "
            f"micro_batch {micro_batch} = {unit}: use global_batch {' or '.join(map(str, near))}, "
            f"or another micro_batch"
        )
