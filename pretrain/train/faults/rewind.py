"""Going back to an earlier checkpoint without leaving the job."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.data.loader import Loader
from pretrain.train.callback import Callback, Run
from pretrain.train.save import Save, restore
from pretrain.train.step import forget_loads


class Rewind:
    def __init__(self, run: Run, checkpoints: Checkpoints, loader: Loader, save: Save, callbacks: Sequence[Callback]):
        self.run, self.checkpoints, self.loader = run, checkpoints, loader
        self.save, self.callbacks = save, callbacks

    def to(self, at_most: int, past: int | None = None) -> bool:
        """To the newest good checkpoint of step `at_most` or an earlier one; False, with nothing changed, if there is none.

        past: a number of steps; the data that the run has used up to it, since the checkpoint, is not used again (PaLM, section
        5.1: the batches around a spike make no spike elsewhere). None: the same data follows again. Learning rates go by the
        step, so they do not jump. Collective.
        """
        run, faults = self.run, self.run.faults
        end = None if past is None else self.loader.position(past)
        self.save.settle(run)
        if not restore(run, self.checkpoints, self.loader, at_most):
            return False
        forget_loads(run.model)
        run.faults = faults.returned_to(run.faults)
        if end is not None:
            run.faults.rollbacks += 1
            self.loader.skip_to(end)
        for callback in self.callbacks:
            callback.on_rewind(run)
        return True
