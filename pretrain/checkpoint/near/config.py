"""The configuration of peer-memory checkpoints."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from parallel.config import Strict


class NearConfig(Strict):
    """Between checkpoints, keep every rank's own state in the memory of its host and of another host."""

    folder: Path = Path("/dev/shm")
    """A folder of each host's own, in memory or on a local disk. A host needs four times the state of its ranks there."""
    every: int = Field(10, ge=1)
    """Steps between near saves. One that falls due while the one before it is under way is skipped."""
    keep: int = Field(1, ge=1)
    """Complete saves to keep; one more is there while it is being written."""
