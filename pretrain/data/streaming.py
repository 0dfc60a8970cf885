"""A source of a run that is text, opened: it stands where a Corpus does, but knows no lengths before it has read.

What follows from that, and from one order of tokens for any number of ranks, is in streaming_lane and streaming_state.
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
import xxhash

from pretrain.data import manifest as manifests
from pretrain.data.config import SourceConfig, StreamConfig
from pretrain.data.errors import DataError, UsageError
from pretrain.data.streaming_datasets import Dataset
from pretrain.data.streaming_files import Files, matched
from pretrain.data.streaming_units import Policy, Units
from pretrain.data.tokenizer import Tokenizer

MOST_LANES = 256
_TRIED = 8  # units, and rows of them, that are looked at when a source is opened


class TextSource:
    """units: of the text. tokenizer_path: what makes it into tokens. stream: how. prefix: names it.

    fingerprint: names the text, by its files' names and sizes or by the data set's name and numbers of shards and rows, and the
    tokenizer, by its bytes. Reading the text for it would take as long as training on it.
    """

    streamed: ClassVar[bool] = True
    manifest: ClassVar[manifests.Manifest | None] = None

    def __init__(self, prefix: Path, units: Units, tokenizer_path: Path, stream: StreamConfig) -> None:
        if units.count == 0:
            raise DataError(f"{prefix} holds no text; check the path, its files are empty")
        if stream.lanes is not None and stream.lanes > units.count:
            raise UsageError(
                f"{prefix}: stream.lanes = {stream.lanes}, but the text has {units.count} units, of which each lane needs one: "
                f"set at most {units.count}, or leave it out"
            )
        self.prefix, self.units, self.tokenizer_path = prefix, units, tokenizer_path
        self.shuffle, self.lanes = stream.shuffle, stream.lanes
        self.held_out = (stream.held_out_seed, stream.held_out)
        opened = self.tokenizer()
        self.vocabulary_size, self.eos = opened.vocabulary_size, opened.eos
        self.tokenizer_hash = opened.fingerprint

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """int32 [vocabulary]: see Tokenizer.token_bytes."""
        return torch.from_numpy(self.tokenizer().token_bytes)

    @cached_property
    def fingerprint(self) -> str:
        names = json.dumps([self.units.identity, self.shuffle, self.held_out, self.tokenizer_hash])
        return xxhash.xxh3_128(names.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_path)

    def lanes_for(self, batch: int) -> int:
        """The number of lanes of a run that begins with so many sequences a step."""
        most = min(batch, self.units.count, MOST_LANES)
        return self.lanes or next(lanes for lanes in range(most, 0, -1) if batch % lanes == 0)


def open_text(source: SourceConfig, tokenizer: Path, skip_bad: bool) -> TextSource:
    """Opens a streamed source. Raises DataError for missing or unreadable text, ValueError for what cannot be streamed."""
    assert source.stream is not None
    units = _units(source.path, source.stream, Policy(source.stream.text_field, skip_bad))
    found = TextSource(source.path, units, tokenizer, source.stream)
    # A wrong field is a matter of the configuration, and better said now than after every row was left out.
    blocks = (block for unit in range(min(units.count, _TRIED)) for block in islice(units.blocks(unit, 0), 1))
    rows = list(islice(((block, row) for block in blocks for row in range(len(block))), _TRIED))
    if rows and all(block.read(row) is None for block, row in rows):
        raise DataError(
            f"{source.path}: none of the first {len(rows)} rows is readable as {source.stream.format} with text in "
            f"{source.stream.text_field!r}; correct stream.format or stream.text_field"
        )
    return found


def _units(path: Path, stream: StreamConfig, policy: Policy) -> Units:
    if stream.kind == "dataset":
        return Dataset(str(path), stream.subset, stream.split, stream.remote, policy)
    return Files(matched(path), stream.format, policy)


def tokenizer_for(given: Path | None, others: list[tuple[Path, str]]) -> Path:
    """The tokenizer of streamed sources: the given one, or that of the others, (path, xxh3_128) of the prepared sources.

    Raises ValueError if there is none, or if it is not the one that the others were written with.
    """
    if given is None:
        if not others:
            raise UsageError(
                "data.tokenizer: not set, and streamed text needs one to be made into tokens: name a SentencePiece .model or "
                "a tokenizer.json, such as the tokenizer.model of a prepared folder"
            )
        return others[0][0]
    opened = Tokenizer(given)
    found = opened.fingerprint
    for path, known in others:
        if known != found:
            raise UsageError(
                f"data.tokenizer = {given} (xxh3_128 {found}) is not the tokenizer that {path.parent} was written with "
                f"({known}); leave it out to use that one for the streamed text too"
            )
    return opened.path
