"""From a run's configuration to its corpora and its loader."""

from __future__ import annotations

from typing import Any

from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.errors import UsageError
from pretrain.data.loader import Loader, same_tokenizer
from pretrain.data.stages import stages_of
from pretrain.data.store import Corpus


def sources_of(data: DataConfig) -> list[SourceConfig]:
    """The sources; a single `path` is one of weight 1."""
    return data.sources or [SourceConfig(path=data.path, validation_path=data.validation_path)]


def open_sources(data: DataConfig, vocabulary: int | None = None) -> list[Corpus]:
    """The training corpora. vocabulary: of the model, to check a bare Megatron pair's ids with.

    Raises DataError for missing or damaged files, ValueError for corpora of different tokenizers.
    """
    options: Any = {"vocabulary_size": vocabulary, "tokenizer": data.tokenizer}
    corpora = [Corpus.open(source.path, "train", **options) for source in sources_of(data)]
    same_tokenizer(corpora)
    return corpora


def open_validation(data: DataConfig, corpora: list[Corpus]) -> dict[str, Corpus]:
    """The validation corpora by the sources' names. Raises ValueError for a bare pair without one, DataError."""
    found = {}
    for source, corpus in zip(sources_of(data), corpora, strict=True):
        if source.validation_path is not None:
            options: Any = {"vocabulary_size": corpus.vocabulary_size, "tokenizer": corpus.tokenizer_path}
            found[source.label] = Corpus.open(source.validation_path, "validation", **options)
        elif corpus.manifest is None:
            key = "data.sources.*.validation_path" if data.sources else "data.validation_path"
            raise UsageError(
                f"data.path = {source.path} is a bare Megatron pair, which has no validation split; set {key}"
            )
        else:
            found[source.label] = Corpus.open(source.path, "validation")
    return found


def loader_of(
    data: DataConfig, corpora: list[Corpus], batch: int, micro_batch: int, rank: int = 0, ranks: int = 1, **options: Any
) -> Loader:
    """The loader that a configuration describes. options: of Loader, on how it reads. Raises ValueError."""
    return Loader(
        corpora,
        stages=stages_of(data, batch, micro_batch),
        seed=data.seed,
        rank=rank,
        ranks=ranks,
        packing=data.packing,
        masked=data.intra_document_masking,
        version=data.order,
        skip_bad=data.on_bad == "skip",
        **options,
    )
