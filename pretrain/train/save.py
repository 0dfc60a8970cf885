"""Checkpoints at intervals, at the end, and when something asks for one; and their way back into a run."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.background import BackgroundSaver
from pretrain.checkpoint.errors import CheckpointError, NoMemory
from pretrain.checkpoint.identity import check_same_model
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.near.tier import Tier
from pretrain.data.config import DataConfig
from pretrain.data.loader import Loader
from pretrain.data.streaming_loader import StreamingLoader
from pretrain.data.tokenizer_check import hash_of
from pretrain.train import heartbeat
from pretrain.train.callback import Callback, Run
from pretrain.train.faults.state import FaultState
from pretrain.train.progress import Progress
from pretrain.train.streams import random_state, restore_random_state

FOLDER = "checkpoints"
GIVE_UP = 3  # failed saves in a row after which the run ends


class Save(Callback):
    phase = "checkpoint"

    def __init__(self, checkpoints: Checkpoints, loader: Loader, progress: Progress):
        self.checkpoints, self.loader, self.progress = checkpoints, loader, progress
        self.background = BackgroundSaver(checkpoints, self._done)
        self.run: Run | None = None
        self.begun = -1  # the newest step whose save has begun
        self.failures = 0
        self.no_memory = False  # for the copy that a save beside training needs

    def on_start(self, run: Run) -> None:
        self.run, self.begun = run, run.step

    def due(self, run: Run) -> bool:
        """Whether this step is saved."""
        return run.last or run.step % run.config.checkpoint.every == 0

    def on_step(self, run: Run) -> None:
        if self.due(run):
            self.save(run)

    def on_rewind(self, run: Run) -> None:
        # At once, and in place of the old one: what the run has learnt on the way that it leaves would be lost with the job.
        self.begun = -1
        self.save(run)

    def settle(self, run: Run) -> None:
        """Ends the save that is under way; whether it failed or not, checkpoints may be read then."""
        try:
            self.background.wait()
        except CheckpointError as error:
            self._failed(run, error)

    def save(self, run: Run) -> None:
        """Begins a save of this step, after the one before has ended. The last one of a run is complete on return."""
        heartbeat.phase("save", run.step)
        try:
            waited = self.background.wait()
            if waited is not None:
                self.failures = 0
            if waited is not None and waited > 1.0:
                self.progress.say(
                    f"step {run.step}: waited {waited:.1f} s for the save before this one; saves are too frequent"
                )
        except CheckpointError as error:  # the same error on every rank
            self._failed(run, error)
        if self.begun == run.step:
            return
        self.begun = run.step
        state, meta, own = run.engine.state_tensors(), content(run, self.loader), random_state(run.processes.device)
        try:
            if not self._begin_beside_training(run, state, meta, own):
                start = time.perf_counter()
                self._done(run.step, self.checkpoints.save(run.step, state, meta, own), time.perf_counter() - start)
                self.failures = 0
        except CheckpointError as error:
            if run.last:
                raise
            self._failed(run, error)

    def _begin_beside_training(
        self, run: Run, state: dict[str, Any], meta: dict[str, Any], own: dict[str, torch.Tensor]
    ) -> bool:
        if run.last or not run.config.checkpoint.background or self.no_memory:
            return False
        try:
            self.background.start(run.step, state, meta, own)
        except NoMemory as error:
            self.no_memory = True
            self.progress.say(f"step {run.step}: {error}; from now on training stops for every save")
            return False
        return True

    def _failed(self, run: Run, error: CheckpointError) -> None:
        self.failures += 1
        if self.failures == GIVE_UP:
            raise error
        self.progress.say(f"step {run.step}: NOT SAVED ({error}); training goes on, the next save is tried")

    def _done(self, step: int, path: Path, seconds: float) -> None:
        self.progress.say(f"step {step}: saved {path} in {seconds:.1f} s")

    def close(self) -> None:
        # Whatever ended the run, what was begun is brought to its end; its failure would hide the cause. But where a rank or the
        # network is gone, the others' part of a save may never come, and they would be waited for as long as for a disk.
        patience = self.run.config.train.timeout if self.run is not None and self.run.broken else None
        with contextlib.suppress(Exception):
            self.background.wait(patience)


def content(run: Run, loader: Loader) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Collective where text is streamed: each rank knows where its own share stands."""
    data = loader.whole(run.processes.gather) if isinstance(loader, StreamingLoader) else loader.state_dict()
    rope_theta = loader.stage(run.step).rope_theta
    return {
        "step": run.step,
        "tokens": run.tokens,
        "data": data,
        "tokenizer": hash_of(loader.corpora),
        "faults": run.faults.to_meta(),
        "config": run.config.model_dump(mode="json"),
        # What the model computes with from here on, where that is no longer what its configuration says.
        **({} if rope_theta is None else {"rope_theta": rope_theta}),
    }


def restore(
    run: Run, checkpoints: Checkpoints, loader: Loader, at_most: int | None = None, near: Tier | None = None
) -> bool:
    """Brings a run to the state of the newest good checkpoint (of this step or an earlier one, with at_most).

    With near, of the newest near save if that is newer. False, and nothing has changed, when there is none of either.
    Collective. Raises ValueError when the checkpoint belongs to another model or data order.
    """
    heartbeat.phase("load")
    tensors = run.engine.state_tensors()
    check = partial(_check, run, loader)
    resumed = near and near.resume(tensors, random_state(run.processes.device), checkpoints.list(), check)
    resumed = resumed or checkpoints.resume(tensors, check=check, at_most=at_most)
    if resumed is None:
        return False
    run.engine.load_state_tensors(tensors)
    run.step, run.tokens = resumed.meta["step"], resumed.meta["tokens"]
    run.faults = FaultState.from_meta(resumed.meta.get("faults"))
    loader.load_state_dict(_data_state(resumed.meta, loader, run))
    if resumed.per_rank is not None:
        restore_random_state(resumed.per_rank)
    else:
        # Another number of ranks: no rank's old stream fits, so start fresh ones, the same at every such resume.
        torch.manual_seed(run.config.train.seed * 1_000_003 + run.step * 1_009 + run.processes.rank)
    return True


def _check(run: Run, loader: Loader, meta: dict[str, Any]) -> None:
    for line in check_same_model(*_identities(run, meta, loader), allow=run.config.checkpoint.allow_changes):
        if run.processes.first:
            print(f"changed as allowed: {line}")


def _identities(run: Run, meta: dict[str, Any], loader: Loader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The saved and the present configuration, each with the hash of its corpus: the folder may move, the text may not.

    And with the tokenizer's: the same ids, read as other text, would not be missed.
    """
    current = run.config.model_dump(mode="json")
    # Settings that the saved configuration does not know have done what their defaults do.
    data = DataConfig.model_validate(meta["config"]["data"]).model_dump(mode="json")
    saved = {**meta["config"], "data": data}
    before, now = {"hash": meta["data"]["corpus"]}, {"hash": loader.fingerprint}
    old, new = meta.get("tokenizer"), hash_of(loader.corpora)
    if old is not None and new is not None:  # a bare pair need not know its own, an older checkpoint does not
        before["tokenizer_hash"], now["tokenizer_hash"] = old, new
    return _with(saved, before), _with(current, now)


def _with(config: dict[str, Any], hashes: dict[str, str]) -> dict[str, Any]:
    return {**config, "data": {**config["data"], **hashes}}


def _data_state(meta: dict[str, Any], loader: Loader, run: Run) -> dict[str, Any]:
    """Where the data goes on. After an allowed change of corpus, seed or length there is no old place: a new order begins."""
    saved = meta["data"]
    return saved if loader.changed(saved) is None else loader.beginning(run.step, run.tokens)
