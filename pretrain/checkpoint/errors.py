"""What can go wrong with checkpoints, as the training loop needs to tell the cases apart."""

from __future__ import annotations

from pretrain.exit import ERROR, NO_CHECKPOINT, Exit


class CheckpointError(RuntimeError):
    """A save or a load failed on some rank. Every rank raises it, with the same text.

    After a failed save nothing is left behind, earlier checkpoints are as they were, and training may go on.
    """

    exit_code = 1


class NoMemory(CheckpointError):
    """Some rank has no host memory for a copy of its state; a save that needs no copy may still work."""


class NoLoadableCheckpoint(Exit):
    """Checkpoints exist, but none can be loaded. Starting from scratch would hide the loss, so the job ends (78)."""

    def __init__(self, message: str):
        super().__init__(message, NO_CHECKPOINT)


class LeaseHeld(Exit):
    """Another job is using the run folder."""

    def __init__(self, message: str):
        super().__init__(message, ERROR)
