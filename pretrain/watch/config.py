"""The watchdog's settings."""

from __future__ import annotations

from pydantic import Field

from parallel.config import Strict


class WatchdogConfig(Strict):
    """The limit of a phase is the floor, or `factor` times the longest that the phase has taken in this run if that is more."""

    enabled: bool = True
    """End a hang with a report and exit code 76."""
    factor: float = Field(10.0, ge=1)
    """Steps are not alike: compilation, a slow disk, a save beside training. Of those seen the longest counts."""
    floor: float = Field(180.0, gt=0)
    """Seconds that a step, or a batch of an evaluation, may always take. A file server that restarts makes all wait for 90."""
    save_floor: float = Field(900.0, gt=0)
    """Seconds that a save, and what comes after the last step, may always take."""
    first: float = Field(3600.0, gt=0)
    """Seconds for what has not been seen before in this run: imports, rendezvous, index building, loading, the first step."""
    gather: float = Field(10.0, gt=0)
    """Seconds to wait for the reports of all ranks before the job is ended."""
