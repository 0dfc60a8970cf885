"""manifest.json: what a prepared folder holds, and the hashes that prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.data.errors import DataError
from pretrain.data.index import REPAIR, read_header

NAME = "manifest.json"
_BLOCK = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """Size in bytes and xxh3_128 (hexadecimal) of one file."""

    bytes: int
    xxh3_128: str


class SplitRecord(_Record):
    """Counts of one split. `bytes` is text bytes; `tokens` includes a bos and an eos per document."""

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    longest_document: int


class TokenizerRecord(_Record):
    """The tokenizer. `lossless`: every document's token bytes add up to its bytes, so bits per byte is exact."""

    vocabulary_size: int
    bos: int
    eos: int
    xxh3_128: str
    trained: bool
    lossless: bool


class Manifest(_Record):
    """The whole file. Holds nothing about the machine, the time or the number of workers: equal inputs give equal
    bytes.
    """

    format: Literal["braid-corpus"] = "braid-corpus"
    version: Literal[1] = 1
    dtype: str
    splits: dict[str, SplitRecord]
    tokenizer: TokenizerRecord
    files: dict[str, FileRecord]
    input_files: int
    dropped: dict[str, int]
    settings: dict[str, Any]


def hash_file(path: Path) -> FileRecord:
    """Size and xxh3_128 of a file, read in blocks."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(bytes=size, xxh3_128=digest.hexdigest())


def check_hash(path: Path, stated: FileRecord) -> None:
    """Raises DataError if the content of `path` is not what the manifest states."""
    found = hash_file(path)
    if found.xxh3_128 != stated.xxh3_128:
        raise DataError(
            f"{path} differs from what was prepared: xxh3_128 {found.xxh3_128}, expected {stated.xxh3_128}; {REPAIR}"
        )


def fingerprint(prefix: Path) -> str:
    """Names the content of a bare `.bin`/`.idx` pair cheaply: the whole index, and the first and last MiB of the
    tokens.
    """
    digest = xxhash.xxh3_128()
    index = prefix.with_name(prefix.name + ".idx")
    read_header(index)
    with index.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    with prefix.with_name(prefix.name + ".bin").open("rb") as stream:
        digest.update(stream.read(_BLOCK))
        stream.seek(max(0, stream.seek(0, 2) - _BLOCK))
        digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def read(folder: Path) -> Manifest:
    """Reads `folder/manifest.json`. Raises DataError if it is missing or not what `prepare` writes."""
    path = folder / NAME
    if not path.is_file():
        raise DataError(
            f"{folder} has no {NAME}, so it is not a prepared corpus; run "
            f"`python -m pretrain.data prepare ... --output {folder}`, or give a Megatron pair as a prefix "
            f"({folder}/NAME without .bin)"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path} is damaged or of another version ({where}: {first['msg']}); {REPAIR}") from None
