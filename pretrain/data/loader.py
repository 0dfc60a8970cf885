"""Training batches: a global step's sequences, divided among data-parallel ranks and micro-batches."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pretrain.data.batch import Batch, pack
from pretrain.data.errors import UsageError
from pretrain.data.order import ORDER_VERSION, Order, joined, past
from pretrain.data.store import Corpus


class Loader:
    """Micro-batches of one data-parallel rank, by global step.

    Step s consumes `global_batch` consecutive sequences of the order. Micro-batch m of rank r holds sequences (m *
    ranks + r) * micro_batch + [0, micro_batch) of them, so the set of sequences in a step, and their order through
    micro-batches and ranks, is the same for any number of ranks. `skipped` spans of the order are passed over, whatever the
    step: sequences are counted without them.

    global_batch: sequences per step over all ranks. micro_batch: sequences per micro-batch. prefetch: prepare the
    next step on a thread. Raises ValueError if global_batch does not divide by ranks * micro_batch, DataError for
    damaged data when a batch is read.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        prefetch: bool = False,
    ) -> None:
        if min(global_batch, micro_batch, ranks) < 1:
            raise UsageError(
                f"global_batch ({global_batch}), micro_batch ({micro_batch}) and ranks ({ranks}) must be at least 1"
            )
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} is not one of {ranks} data-parallel ranks")
        if global_batch % (ranks * micro_batch):
            unit = ranks * micro_batch
            near = sorted({max(unit, global_batch // unit * unit), (global_batch // unit + 1) * unit})
            raise UsageError(
                f"global_batch {global_batch} does not divide by {ranks} data-parallel ranks x "
                f"micro_batch {micro_batch} = {unit}: use global_batch {' or '.join(map(str, near))}, "
                f"or another micro_batch"
            )
        self.corpus = corpus
        self.order = Order(corpus.lengths, sequence_length, seed)
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.ranks = ranks
        _ = corpus.dataset  # imported and mapped here, not on the first step's clock or on the thread
        # The steps that this loader numbers from here on: step `_base_step` begins at sequence `_base_sequence`.
        self._base_step = 0
        self._base_sequence = 0
        self._next_step = 0
        self.skipped: list[tuple[int, int]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on each rank (gradient accumulation steps)."""
        return self.global_batch // (self.ranks * self.micro_batch)

    @property
    def steps_per_epoch(self) -> float:
        """Global steps that one pass over the corpus lasts."""
        return self.order.windows_per_epoch / self.global_batch

    def first_sequence(self, step: int) -> int:
        """Number of the first sequence of a global step."""
        first = self._base_sequence + (step - self._base_step) * self.global_batch
        if step < 0 or first < 0:
            raise UsageError(f"step {step} lies before the first sequence of this run")
        return first

    def position(self, step: int) -> int:
        """Where the order stands after `step` steps of this run: the number after that of the last sequence used."""
        return past(self.skipped, self.first_sequence(step) - 1) + 1

    def skip_to(self, position: int) -> None:
        """Leaves out what comes next, up to `position`, in this run and in those that load its state."""
        self._drop_ahead()
        first = past(self.skipped, self.first_sequence(self._next_step))
        if first < position:
            self.skipped = joined(self.skipped, first, position)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`, in the order in which to run them. Any step may be asked
        for at any time.
        """
        if self._ahead is not None and self._ahead[0] == step:
            future, self._ahead = self._ahead[1], None
            found = future.result()
        else:
            self._drop_ahead()
            found = self._read(step)
        self._next_step = step + 1
        if self._thread is not None:
            self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return found

    def _read(self, step: int) -> list[Batch]:
        first = self.first_sequence(step)
        result = []
        for number in range(self.micro_batches):
            start = first + (number * self.ranks + self.rank) * self.micro_batch
            windows = [self.order.spans(past(self.skipped, start + i)) for i in range(self.micro_batch)]
            result.append(pack(self.corpus, windows, self.order.sequence_length))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands after the last step handed out; the same on all ranks, plain values only."""
        return {
            "order_version": ORDER_VERSION,
            "corpus": self.corpus.fingerprint,
            "seed": self.order.seed,
            "sequence_length": self.order.sequence_length,
            "step": self._next_step,
            "sequences": self.first_sequence(self._next_step),
            "skipped": [list(span) for span in self.skipped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last step of the run that saved `state`; ranks, micro_batch and global_batch may differ
        from that run's.

        Raises ValueError if the corpus, seed, sequence_length or the order's version differ: the same tokens would
        not follow.
        """
        mine = self.state_dict()
        causes = {
            "corpus": "point `data.path` at the corpus that the checkpoint was trained on",
            "seed": "set the data seed to the checkpoint's",
            "sequence_length": "set `sequence_length` to the checkpoint's",
            "order_version": "use the release that wrote the checkpoint",
        }
        for key, fix in causes.items():
            if state.get(key) != mine[key]:
                where = f" ({self.corpus.prefix})" if key == "corpus" else ""
                raise UsageError(
                    f"cannot continue the data order: the checkpoint has {key} {state.get(key)!r}, "
                    f"this run has {mine[key]!r}{where}; {fix}, or start a new run"
                )
        self._drop_ahead()
        self._base_step = self._next_step = int(state["step"])
        self._base_sequence = int(state["sequences"])
        self.skipped = [(int(first), int(end)) for first, end in state.get("skipped", [])]

    def _drop_ahead(self) -> None:
        # The thread must be done before the numbering and the order's tables, which it reads, are used from here.
        if self._ahead is not None:
            future, self._ahead = self._ahead[1], None
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """Ends the prefetch thread."""
        self._drop_ahead()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
