"""From a run's configuration to its corpora and its loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.errors import UsageError
from pretrain.data.loader import Loader
from pretrain.data.stages import stages_of
from pretrain.data.store import Corpus
from pretrain.data.streaming import TextSource, open_text, tokenizer_for
from pretrain.data.streaming_loader import StreamingLoader
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_check import same_tokenizer

Source = Corpus | TextSource


def sources_of(data: DataConfig) -> list[SourceConfig]:
    """The sources; a single `path` is one of weight 1."""
    return data.sources or [SourceConfig(path=data.path, validation_path=data.validation_path)]


def open_sources(data: DataConfig, vocabulary: int | None = None) -> list[Source]:
    """The training corpora. vocabulary: of the model, to check a bare Megatron pair's ids with.

    Raises DataError for missing or damaged files, ValueError for corpora of different tokenizers.
    """
    options: Any = {"vocabulary_size": vocabulary, "tokenizer": data.tokenizer}
    sources = sources_of(data)
    prepared = {
        number: Corpus.open(source.path, "train", **options)
        for number, source in enumerate(sources)
        if source.stream is None
    }
    same_tokenizer(list(prepared.values()), data.tokenizer)
    if len(prepared) == len(sources):
        return list(prepared.values())
    written = [(each.tokenizer_path, each.manifest.tokenizer.xxh3_128) for each in prepared.values() if each.manifest]
    tokenizer = tokenizer_for(data.tokenizer, [(path, known) for path, known in written if path is not None])
    return [
        prepared.get(number) or open_text(source, tokenizer, data.on_bad == "skip")
        for number, source in enumerate(sources)
    ]


def open_validation(data: DataConfig, corpora: Sequence[Source]) -> dict[str, Corpus]:
    """The validation corpora by the sources' names. Raises ValueError for a bare pair or a stream without one, DataError."""
    found = {}
    for source, corpus in zip(sources_of(data), corpora, strict=True):
        if source.validation_path is not None:
            options: Any = {"vocabulary_size": corpus.vocabulary_size, "tokenizer": corpus.tokenizer_path}
            opened = Corpus.open(source.validation_path, "validation", **options)
            if isinstance(corpus, TextSource):
                _same(opened, corpus)
            found[source.label] = opened
        elif corpus.manifest is None:
            key = "data.sources.*.validation_path" if data.sources else "data.validation_path"
            what = "is streamed" if isinstance(corpus, TextSource) else "is a bare Megatron pair"
            raise UsageError(f"data.path = {source.path} {what}, which has no validation split; set {key}")
        else:
            found[source.label] = Corpus.open(source.path, "validation")
    return found


def _same(validation: Corpus, streamed: TextSource) -> None:
    record = validation.manifest
    if record is not None and record.tokenizer.xxh3_128 != streamed.tokenizer_hash:
        raise UsageError(
            f"{validation.prefix.parent} was written with another tokenizer (xxh3_128 {record.tokenizer.xxh3_128}) than the "
            f"one of {streamed.prefix} ({streamed.tokenizer_hash}): set data.tokenizer = {validation.tokenizer_path}"
        )


def vocabulary_size(data: DataConfig) -> int | None:
    """Of the run's tokenizer, without reading text; None if nothing says it. Raises DataError, ValueError."""
    first = next((source for source in sources_of(data) if source.stream is None), None)
    if first is not None:
        return Corpus.open(first.path, tokenizer=data.tokenizer).vocabulary_size
    return Tokenizer(tokenizer_for(data.tokenizer, [])).vocabulary_size


def loader_of(
    data: DataConfig,
    corpora: Sequence[Source],
    batch: int,
    micro_batch: int,
    rank: int = 0,
    ranks: int = 1,
    **options: Any,
) -> Loader:
    """The loader that a configuration describes. options: of Loader, on how it reads. Raises ValueError."""
    text = any(isinstance(corpus, TextSource) for corpus in corpora)
    make: Callable[..., Loader] = StreamingLoader if text else Loader
    return make(
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
