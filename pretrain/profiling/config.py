"""The `profile` section of a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from parallel.config import Strict


class ProfileConfig(Strict):
    """Some steps of a run under torch's profiler. They are slower than others, and their numbers in metrics.jsonl with them."""

    start: int = Field(10, ge=1)
    """The first profiled step. The first steps of a run compile, allocate and connect ranks: they tell little."""
    steps: int = Field(3, ge=1, le=100)
    """How many steps."""
    ranks: Literal["first", "all"] = "first"
    """Who writes a trace."""
    memory: bool = True
    """Also record every allocation, for the timeline."""
