"""Checkpoints: how bytes are written, when they count, who may write them, and whether they belong to this run.

storage.py    how bytes are written: named tensors to a folder and back, across any number of ranks
planned.py    the files of a checkpoint: which part of which tensor lies where
blocks.py     files that are hashed from memory block by block, and checked block by block as they are read
sealed.py     JSON that carries its own hash
folder.py     what is on disk: names, `meta.json`, which checkpoints are complete, which is the newest
lifecycle.py  when a checkpoint counts: reserve, write, commit, publish, prune; all ranks decide together
background.py saves beside training, from a copy of the state (snapshot.py)
agreement.py  how ranks decide together
lease.py      one job to a run folder
identity.py   does this checkpoint belong to this configuration
durable.py    files and folders that survive a power cut
bench.py      what all this costs, against the bare disk

Names are imported on first use, so that the command line answers `--help` without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.checkpoint.agreement import Agreement
    from pretrain.checkpoint.errors import CheckpointError, LeaseHeld, NoLoadableCheckpoint
    from pretrain.checkpoint.identity import check_same_model
    from pretrain.checkpoint.lease import Lease
    from pretrain.checkpoint.lifecycle import Checkpoints, Resumed

_HOME = {
    "Agreement": "agreement",
    "CheckpointError": "errors",
    "LeaseHeld": "errors",
    "NoLoadableCheckpoint": "errors",
    "check_same_model": "identity",
    "Lease": "lease",
    "Checkpoints": "lifecycle",
    "Resumed": "lifecycle",
}
__all__ = [
    "Agreement",
    "CheckpointError",
    "Checkpoints",
    "Lease",
    "LeaseHeld",
    "NoLoadableCheckpoint",
    "Resumed",
    "check_same_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
