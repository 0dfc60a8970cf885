"""Near saves beside training: each rank's own state, kept on its host and on another one (see pretrain/checkpoint/near)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain.checkpoint.agreement import Agreement, describe
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.near.tier import IDENTITY, Tier
from pretrain.checkpoint.snapshot import Snapshots
from pretrain.config import RunConfig
from pretrain.data.loader import Loader
from pretrain.train.callback import Callback, Run
from pretrain.train.progress import Progress
from pretrain.train.save import content
from pretrain.train.streams import random_state

PATIENCE = 10.0  # seconds for what is under way when a run ends in an error


def open_tier(config: RunConfig, job: Processes, mesh: Mesh, checkpoints: Checkpoints) -> Tier | None:
    """The near tier that the configuration asks for. Collective."""
    if config.checkpoint.near is None:
        # A run that goes on without near saves leaves those of earlier jobs behind it: they must not come back later.
        if job.first:
            (checkpoints.folder / IDENTITY).unlink(missing_ok=True)
        return None
    group = dist.new_group(backend="gloo", timeout=job.timeout) if dist.is_initialized() else None
    return Tier(
        config.checkpoint.near,
        checkpoints.folder,
        f"{mesh.picture()}, {config.engine.kind} engine",
        agreement=Agreement(group),
        committed=lambda: checkpoints.committed,
        report=partial(print, flush=True),
    )


class Near(Callback):
    """Training is held while the state is copied, and no longer. A save that falls due while one is under way is skipped."""

    phase = "checkpoint"

    def __init__(self, tier: Tier | None, checkpoints: Checkpoints, loader: Loader, progress: Progress):
        self.tier, self.checkpoints, self.loader, self.progress = tier, checkpoints, loader, progress
        self.snapshots = Snapshots()
        self.thread: Thread | None = None
        self.free = threading.Event()  # whether the snapshot may be taken anew
        self.free.set()
        self.rounds = self.saved = 0
        self.held = 0.0  # seconds of training
        self.broken = False  # the ranks can no longer speak about near saves

    def on_start(self, run: Run) -> None:
        if self.tier is None or self.tier.off:
            return
        self.thread = Thread()
        self.tier.report = self.progress.say
        hosts, near = len(self.tier.hosts.members), self.tier.config
        what = f"{hosts} hosts, each keeps another's" if hosts > 1 else "one host: they outlive processes, not the host"
        self.progress.say(f"near memory: every {near.every} steps in {self.tier.store.run}; {what}")

    def due(self, run: Run) -> bool:
        """Whether this step is saved, if nothing is in the way; all ranks say the same. The last one goes to disk."""
        if self.tier is None or self.thread is None:
            return False
        return not run.last and run.step % self.tier.config.every == 0

    def on_step(self, run: Run) -> None:
        if not self.due(run):
            return
        start = time.perf_counter()
        meta = content(run, self.loader)  # collective where text is streamed, so also by a rank whose saves have ended
        if self.broken:
            return
        assert self.tier is not None and self.thread is not None
        state = run.engine.state_tensors()  # collective, so also by a rank that is busy
        copy, unable = None, ""
        if self.free.is_set() and not self.tier.off:
            own = {f"rank/{name}": tensor for name, tensor in random_state(run.processes.device).items()}
            try:
                copy = self.snapshots.take({**state, **own})
                self.free.clear()
            except (MemoryError, RuntimeError) as error:  # RuntimeError is what torch raises
                self.snapshots = Snapshots()  # lets go of what was already allocated
                unable = f"no memory for a copy of the state ({describe(error)})"
        # Also without a copy: the others may have one. All have the same saves in the same order, and hear there who has none.
        self.thread.put(partial(self._save, run.step, copy, meta, unable))
        self.rounds += 1
        self.held += time.perf_counter() - start
        if self.thread.error is not None:
            self.broken = True
            self.progress.say(f"no more saves in near memory: {self.thread.error}; training goes on")

    def _save(self, step: int, state: dict[str, Tensor] | None, meta: dict[str, Any], unable: str) -> None:
        assert self.tier is not None
        self.saved += self.tier.save(step, state, meta, unable)
        if state is not None:
            self.free.set()

    def on_rewind(self, run: Run) -> None:
        if self.tier is None:
            return
        if self._idle(run):
            self.tier.forget()
        elif run.processes.first:
            (self.checkpoints.folder / IDENTITY).unlink(missing_ok=True)  # the next job makes a new one

    def _idle(self, run: Run) -> bool:
        """Waits until all saves that were begun have ended. False if some rank can no longer speak about them."""
        if self.thread is not None:
            self.thread.wait()
        broken = self.thread is not None and self.thread.error is not None
        return run.processes.sum([float(broken)])[0] == 0

    def on_end(self, run: Run) -> None:
        if self.tier is None:
            return
        idle = self._idle(run)
        if self.rounds:
            each = 1000 * self.held / self.rounds
            self.progress.say(
                f"near memory: {self.saved} of {self.rounds} saves; training was held for {each:.1f} ms each"
            )
        if not idle:
            return
        newest = next((entry for entry in self.checkpoints.list() if not entry.fault), None)
        if newest is None or newest.step != run.step:
            # Resumed from near memory with no step left to make: it is nowhere else yet.
            state, own = run.engine.state_tensors(), random_state(run.processes.device)
            path = self.checkpoints.save(run.step, state, content(run, self.loader), own)
            self.progress.say(f"step {run.step}: saved {path}")
        try:
            self.tier.clear()
        except CheckpointError as error:
            self.progress.say(f"{self.tier.store.run} is left on some hosts: {error}")

    def close(self) -> None:
        if self.thread is not None:
            self.thread.end(PATIENCE)
            self.thread = None


class Thread:
    """Runs functions one after the other, beside the main thread, until one fails: `error` is then what it raised."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="near", daemon=True)  # a job's end waits for nobody
        self.thread.start()

    def put(self, function: Callable[[], None]) -> None:
        self.queue.put(function)

    def wait(self) -> None:
        """Until everything put so far has run, or has been dropped because something failed."""
        done = threading.Event()
        self.queue.put(done.set)
        while not done.wait(0.05) and self.thread.is_alive():
            pass

    def end(self, seconds: float) -> None:
        self.queue.put(None)
        self.thread.join(seconds)

    def _work(self) -> None:
        with contextlib.suppress(SystemExit):
            while (function := self.queue.get()) is not None:
                try:
                    function()
                except BaseException as error:
                    self.error = error
                    return
