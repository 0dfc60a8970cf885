"""Saves that run beside training: the state is copied to host memory, the rest happens in a thread.

One save at a time and one copy of the state: if the disk is slower than the interval, the next save waits for the one before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.agreement import describe
from pretrain.checkpoint.errors import CheckpointError, NoMemory
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.snapshot import Snapshots, held_bytes


class BackgroundSaver:
    """Every rank makes the same calls. While a save is under way nothing else may use its `checkpoints`."""

    def __init__(self, checkpoints: Checkpoints, done: Callable[[int, Path, float], None]) -> None:
        """done: called in the thread of each rank with step, folder and seconds, when a save has been committed."""
        self.checkpoints, self.done = checkpoints, done
        self._snapshots = Snapshots()
        self._has_memory = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], per_rank: Mapping[str, Tensor]
    ) -> None:
        """Returns when the state has been copied. `wait` for the save before this one first.

        Raises NoMemory, on every rank, if some rank has no room for the copy: then nothing has begun.
        """
        assert self._thread is None, "one save at a time"
        state = self._copy({**tensors, **{f"rank/{name}": tensor for name, tensor in per_rank.items()}})
        own = {name.removeprefix("rank/"): state.pop(name) for name in list(state) if name.startswith("rank/")}
        self._thread = threading.Thread(
            target=self._save, args=(step, state, dict(meta), own), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._has_memory:
            return self._snapshots.take(tensors)
        taken: list[dict[str, Tensor]] = []

        def attempt() -> None:
            try:
                taken.append(self._snapshots.take(tensors))
            except (MemoryError, RuntimeError) as error:  # RuntimeError is what torch raises
                size = held_bytes(tensors) / 2**30
                raise CheckpointError(f"no memory for {size:.3g} GiB ({describe(error)})") from None

        try:
            self.checkpoints.agreement.everyone("copying the state to host memory", attempt)
        except CheckpointError as error:
            self._snapshots = Snapshots()  # lets go of what was already allocated
            raise NoMemory(str(error)) from None
        self._has_memory = True  # the same memory serves every later copy, so nobody needs to ask again
        return taken[0]

    def _save(self, step: int, state: dict[str, Tensor], meta: dict[str, Any], own: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        try:
            path = self.checkpoints.save(step, state, meta, own)
            self.done(step, path, time.perf_counter() - start)
        except BaseException as error:  # raised by `wait`
            self._error = error

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank; ranks may differ for a moment."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> float | None:
        """Seconds waited for the save that was begun last; None if there is none. Raises what it raised: alike on every rank.

        seconds: how long at most, for a run that ends: a save that is not done then is never committed, and ends with the
        process. Raises TimeoutError.
        """
        if self._thread is None:
            return None
        start = time.perf_counter()
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"the save was not done after {seconds:g} s")
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return time.perf_counter() - start
