"""The `data` section of a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from parallel.config import Strict


class StreamConfig(Strict):
    """Text that is made into tokens while training reads it."""

    kind: Literal["files", "dataset"] = "files"
    """files: `path` is a glob, or a folder, of text, jsonl or Parquet files. dataset: it is the name of a Hugging Face data set,
    or a folder that holds one."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Of files; auto goes by their names."""
    text_field: str = "text"
    """Where rows hold the text."""
    subset: str | None = None
    """Of a data set, the name of one of its configurations."""
    split: str = "train"
    """Of a data set."""
    remote: bool = True
    """Rows of a data set are fetched as they are read; false: all of it is downloaded before."""
    shuffle: bool = True
    """Units of the text (stretches of files, row groups, shards) are shuffled in each epoch, and the rows within each."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Leaves out the documents that `prepare --validation X --seed S` would put into its validation split, by their content: X,
    so that such a split of the same text, or of a part of it, can be validated on."""
    held_out_seed: int = 0
    """S."""
    lanes: int | None = Field(None, ge=1)
    """Parts that are read side by side: sequence n comes from lane n % lanes. A data-parallel rank tokenises the lanes that its
    sequences are in: only its own share, if ranks x micro_batch divides this and there is no other source; in a blend, all of
    them. None: as many as a step has sequences, or the largest divisor of that up to 256 and up to the number of units. A run
    that goes on keeps its own."""


class SourceConfig(Strict):
    """One corpus of a blend."""

    path: Path
    """Folder written by `python -m pretrain.data prepare`, or the prefix of a Megatron .bin/.idx pair; with `stream`, where the
    text is."""
    stream: StreamConfig | None = None
    """Makes text into tokens on the fly, with `data.tokenizer` or the other sources'; data.workers processes of each rank do
    it. It needs a validation_path."""
    weight: float = Field(1.0, ge=0)
    """Share of the training sequences, in proportion to the other sources' weights."""
    name: str | None = None
    """What metrics call it; the last part of the path when left out."""
    validation_path: Path | None = None
    """Folder written by `prepare`, or prefix of a Megatron pair, to validate on; None takes the validation split of `path`."""

    @property
    def label(self) -> str:
        return self.name or self.path.name


class StageConfig(Strict):
    """What changes at the first step before which the run has seen `tokens` tokens. What is left out stays as it was."""

    tokens: int = Field(gt=0)
    batch: int | None = Field(None, ge=1)
    """Sequences per optimizer step (before any stage: train.batch)."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences that one rank computes at a time (before any stage: train.micro_batch)."""
    sequence_length: int | None = Field(None, ge=1)
    """Tokens per training sequence; every source begins a new pass."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary position embedding of all mixers that have one."""
    weights: list[float] | None = None
    """One weight for each source, in their order."""

    @model_validator(mode="after")
    def _weights(self) -> StageConfig:
        if self.weights is not None and any(weight < 0 for weight in self.weights):
            raise ValueError("weights are 0 or more")
        return self


class DataConfig(Strict):
    """Where the tokens are and how they are cut."""

    path: Path
    """Folder written by `python -m pretrain.data prepare`, or the prefix of a Megatron .bin/.idx pair. With `sources`, the
    first one's path: leave it out."""
    sequence_length: int = Field(gt=0)
    """Tokens per training sequence (T). Documents are packed; nothing is carried from one to the next."""
    seed: int = 0
    """Fixes the order of documents and windows, apart from the seed of the weights."""
    prefetch: bool = True
    """Read the next step's batches on a thread while this one trains."""
    validation_path: Path | None = None
    """Prefix of a Megatron pair to validate on; None takes the validation split of `path`."""
    tokenizer: Path | None = None
    """SentencePiece .model, tokenizer.json or a folder with one, for a bare Megatron pair, which has none beside it, and for
    streamed text; a prepared folder brings its own, and refuses another here."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """Several corpora, blended by weight, instead of one `path`."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Batch size, sequence length, rope base and weights that change as tokens are seen."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """best_fit: documents that fit into a sequence are never cut; the rest of a sequence is padding. It reads a few places of
    the file at a time: give it a corpus whose documents are shuffled, as `prepare` writes them."""
    intra_document_masking: bool = True
    """Documents in a sequence do not see each other, and none is predicted from another; false: a sequence is one context."""
    order: Literal[1, 2] = 2
    """Version of the token order of a new run; one that goes on keeps its own. 2 shuffles sequences, not documents, which
    `prepare` shuffles; a pair of other origin that is sorted by topic or source should be shuffled by its writer, or read
    by 1, which holds 16 bytes a document and takes longer to find a step."""
    workers: int = Field(0, ge=0)
    """Processes of each rank that read ahead; 0 reads on a thread of the training process (see `prefetch`)."""
    on_bad: Literal["error", "skip"] = "error"
    """A document with a token outside the vocabulary ends the run, or is left out (as padding) and counted."""

    @model_validator(mode="before")
    @classmethod
    def _path_of_sources(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("sources"), list) and data["sources"] and "path" not in data:
            first = data["sources"][0]
            if isinstance(first, dict | SourceConfig):
                path = first.path if isinstance(first, SourceConfig) else first.get("path")
                return {**data, "path": path} if path is not None else data
        return data

    @model_validator(mode="after")
    def _one_place(self) -> DataConfig:
        if self.sources and self.path != self.sources[0].path:
            raise ValueError(f"path = {self.path} is not the first of sources ({self.sources[0].path}); leave it out")
        if self.sources and self.validation_path is not None:
            raise ValueError("validation_path: with sources, give it to each of them")
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"sources {labels} need names that differ; give each a `name`")
        if self.order == 1 and (self.packing != "concatenate" or len(self.sources) > 1):
            raise ValueError("order = 1 knows no blends and no best_fit; leave it out")
        streamed = [source.label for source in self.sources if source.stream is not None]
        if streamed and self.packing == "best_fit":
            raise ValueError(
                f"packing = best_fit needs the length of every document before the first step, and of {streamed[0]}, which "
                "is streamed, they are only known once it is read: use concatenate, or prepare it first"
            )
        if streamed and self.order == 1:
            raise ValueError(f"order = 1 knows no streamed sources ({streamed[0]}); leave it out")
        return self
