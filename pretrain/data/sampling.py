"""The text that a tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pretrain.data.encode import digest_of, split_of
from pretrain.data.options import PrepareOptions
from pretrain.data.order import permutation
from pretrain.data.sources import Reading, documents
from pretrain.data.units import File, Unit, documents_of

_SAMPLED = 4096

Source = tuple[Callable[[], Iterator[str]], int]
"""Gives the documents of a file or of a part of a dataset; bytes of input in it."""


def sources_of(files: list[File], units: list[Unit], reading: Reading) -> list[Source]:
    """Whole files, and those units that are parts of datasets."""
    found: list[Source] = [(partial(documents, path, form, reading), size) for path, form, size in files]
    return found + [(partial(documents_of, unit, reading), unit.size) for unit in units if unit.dataset is not None]


def sample(
    sources: list[Source], options: PrepareOptions, reading: Reading, report: Callable[[str, int, int], None]
) -> list[str]:
    """At most `sample_bytes` of training text, the same amount from each source as far as they last; never validation
    text, nor what the filters leave out.
    """
    chosen = [sources[i] for i in permutation(len(sources), options.seed)[:_SAMPLED]]
    chosen.sort(key=lambda item: item[1])  # small ones first: what they leave over is shared among the larger
    left, texts = options.sample_bytes, []
    for number, (read, _) in enumerate(chosen):
        share = left // (len(chosen) - number)
        for text in read():
            raw = text.encode()
            size = len(raw)
            if not size or (options.filters.active and options.filters.reject(text, reading.tag) is not None):
                continue
            if split_of(digest_of(raw), options.seed, options.validation) == "train":
                texts.append(text if size <= share else raw[:share].decode(errors="ignore"))
                left, share = left - min(size, share), share - min(size, share)
            if share <= 0:
                break
        report("sampling text", options.sample_bytes - left, options.sample_bytes)
    return texts
