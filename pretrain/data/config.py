"""The `data` section of a run's configuration."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from parallel.config import Strict


class DataConfig(Strict):
    """Where the tokens are and how they are cut."""

    path: Path
    """Folder written by `python -m pretrain.data prepare`, or the prefix of a Megatron .bin/.idx pair."""
    sequence_length: int = Field(gt=0)
    """Tokens per training sequence (T). Documents are packed; nothing is carried from one to the next."""
    seed: int = 0
    """Fixes the order of documents and windows, apart from the seed of the weights."""
    prefetch: bool = True
    """Read the next step's batches on a thread while this one trains."""
    validation_path: Path | None = None
    """Prefix of a Megatron pair to validate on; None takes the validation split of `path`."""
    tokenizer: Path | None = None
    """SentencePiece .model for a bare Megatron pair, which has none beside it; a prepared folder brings its own."""
