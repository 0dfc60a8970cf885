"""What `python -m pretrain.data prepare` takes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.errors import UsageError
from pretrain.data.filters import Filters
from pretrain.data.hub import HubDataset
from pretrain.data.sources import FORMATS, Reading


def default_workers() -> int:
    """Processes to encode with: the cores this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass
class PrepareOptions:
    """What `python -m pretrain.data prepare` takes; see its --help. Raises ValueError for a value out of range.

    input: globs of files. datasets: of Hugging Face, after the files. near_duplicates: the similarity from which on
    documents count as such, None to keep them. shard: (number from 1, of how many), None for all. unit_bytes: of a unit
    of work, by the size of the input if None.
    """

    input: list[str]
    output: Path
    exclude: list[str] = field(default_factory=list)
    format: str = "auto"
    text_field: str = "text"
    vocabulary: int = 4096
    tokenizer: Path | None = None
    validation: float = 0.05
    workers: int = field(default_factory=default_workers)
    seed: int = 0
    limit_bytes: int | None = None
    sample_bytes: int = 32_000_000
    document_bytes: int = 0
    on_bad: str = "error"
    overwrite: bool = False
    datasets: list[HubDataset] = field(default_factory=list)
    shuffle: bool = True
    filters: Filters = field(default_factory=Filters)
    near_duplicates: float | None = None
    byte_fallback: bool = True
    user_symbols: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    restart: bool = False
    unit_bytes: int | None = None

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        if not self.input and not self.datasets:
            raise UsageError("no input: pass at least one `--input 'GLOB'` or `--dataset NAME`")
        if self.format not in ("auto", *FORMATS):
            raise UsageError(f"unknown format {self.format!r}: pass one of auto, {', '.join(FORMATS)}")
        if self.on_bad not in ("error", "skip"):
            raise UsageError(f"on_bad is {self.on_bad!r}: pass error or skip")
        if not 0 <= self.validation < 1:
            raise UsageError(
                f"--validation {self.validation} is not a share: pass a number from 0 to below 1, such as 0.05"
            )
        for name in ("workers", "sample_bytes", "limit_bytes", "unit_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                leave = ", or leave it out" if name in ("limit_bytes", "unit_bytes") else ""
                raise UsageError(f"--{name.replace('_', '-')} {value}: pass at least 1{leave}")
        if self.document_bytes and self.document_bytes < 1024:
            raise UsageError(f"--document-bytes {self.document_bytes} is too small: pass 1024 or more, or leave it out")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise UsageError(
                f"--near-duplicates {self.near_duplicates}: pass a similarity above 0 up to 1, such as 0.8"
            )
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"--shard {self.shard[0]}/{self.shard[1]}: pass 1/N, 2/N, ... N/N on N machines")
        if self.shard is not None and self.limit_bytes is not None:
            raise UsageError(
                "--limit-bytes and --shard together: a shard cannot know what the others have taken; leave one out"
            )

    def reading(self) -> Reading:
        """A fresh reading policy."""
        return Reading(self.text_field, self.on_bad == "skip", self.document_bytes, self.filters.language_field)

    def settings(self) -> dict[str, Any]:
        """What decides the corpus, for its manifest: nothing about the machine or the number of workers."""
        found: dict[str, Any] = {
            "input": self.input,
            "exclude": self.exclude,
            "format": self.format,
            "text_field": self.text_field,
            "validation": self.validation,
            "seed": self.seed,
            "limit_bytes": self.limit_bytes,
            "sample_bytes": self.sample_bytes if self.tokenizer is None else None,
            "document_bytes": self.document_bytes,
            "on_bad": self.on_bad,
            "shuffle": self.shuffle,
        }
        if self.datasets:
            found["datasets"] = [vars(dataset) for dataset in self.datasets]
        if self.filters.active:
            found["filters"] = self.filters.settings()
        if self.near_duplicates is not None:
            from pretrain.data.near import version

            found["near_duplicates"] = {"threshold": self.near_duplicates, "signatures": version()}
        return found

    def unit_settings(self) -> dict[str, Any]:
        """What all units of one folder must have in common: `settings`, and what made the tokenizer."""
        trained = {
            "vocabulary": self.vocabulary,
            "byte_fallback": self.byte_fallback,
            "user_symbols": self.user_symbols,
        }
        return {
            **self.settings(),
            "unit_bytes": self.unit_bytes,
            "trained": {**trained, "user_symbols": list(self.user_symbols)} if self.tokenizer is None else None,
        }
