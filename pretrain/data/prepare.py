"""Text to a folder of tokens: the tokenizer, `.bin`/`.idx` for each split, the held-out text, and manifest.json."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.data import interruption
from pretrain.data import manifest as manifests
from pretrain.data.encode import BATCH_BYTES, Encoded, encode_all
from pretrain.data.errors import DataError, PrepareFailure, UsageError
from pretrain.data.megatron import indexed_dataset
from pretrain.data.order import permutation
from pretrain.data.sources import FORMATS, Reading, documents, expand, format_of
from pretrain.data.staging import check_output, staged
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.vocabulary import train

SPLITS = ("train", "validation")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAMPLED_FILES = 4096

Report = Callable[[str, int, int], None]
"""Called with the name of the stage, bytes of input done and bytes of input in all."""


def default_workers() -> int:
    """Processes to encode with: the cores this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass
class PrepareOptions:
    """What `python -m pretrain.data prepare` takes; see its --help. Raises ValueError for a value out of range."""

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

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        if not self.input:
            raise UsageError("no input: pass at least one `--input 'GLOB'`")
        if self.format not in ("auto", *FORMATS):
            raise UsageError(f"unknown format {self.format!r}: pass one of auto, {', '.join(FORMATS)}")
        if self.on_bad not in ("error", "skip"):
            raise UsageError(f"on_bad is {self.on_bad!r}: pass error or skip")
        if not 0 <= self.validation < 1:
            raise UsageError(
                f"--validation {self.validation} is not a share: pass a number from 0 to below 1, such as 0.05"
            )
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: pass at least 1")
        if self.sample_bytes < 1:
            raise UsageError(f"--sample-bytes {self.sample_bytes}: pass at least 1")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise UsageError(f"--limit-bytes {self.limit_bytes}: pass at least 1, or leave it out")
        if self.document_bytes and self.document_bytes < 1024:
            raise UsageError(f"--document-bytes {self.document_bytes} is too small: pass 1024 or more, or leave it out")

    def reading(self, cache: Path) -> Reading:
        """A fresh reading policy; datasets keeps its lock files under `cache`."""
        return Reading(self.text_field, self.on_bad == "skip", self.document_bytes, str(cache))


def split_of(digest: bytes, seed: int, validation: float) -> str:
    """The split of a document with this xxh3_128 digest: decided by its content alone, so that other documents cannot
    move it.
    """
    return "validation" if xxhash.xxh3_64_intdigest(digest, seed=seed) < validation * 2.0**64 else "train"


def _digest(text: str) -> tuple[bytes, int]:
    raw = text.encode()
    return xxhash.xxh3_128_digest(raw), len(raw)


def sample(files: list[tuple[Path, str, int]], options: PrepareOptions, reading: Reading, report: Report) -> list[str]:
    """At most `sample_bytes` of training text, the same amount from each file as far as they last; never validation
    text.
    """
    chosen = [files[i] for i in permutation(len(files), options.seed)[:_SAMPLED_FILES]]
    chosen.sort(key=lambda item: item[2])  # small files first: what they leave over is shared among the larger
    left, texts = options.sample_bytes, []
    for number, (path, form, _) in enumerate(chosen):
        share = left // (len(chosen) - number)
        for text in documents(path, form, reading):
            digest, size = _digest(text)
            if size and split_of(digest, options.seed, options.validation) == "train":
                texts.append(text if size <= share else text.encode()[:share].decode(errors="ignore"))
                left, share = left - min(size, share), share - min(size, share)
            if share <= 0:
                break
        report("sampling text", options.sample_bytes - left, options.sample_bytes)
    return texts


class _Writer:
    """Splits, counts and writes documents."""

    def __init__(self, folder: Path, options: PrepareOptions, reading: Reading, report: Report) -> None:
        self.folder = folder
        self.options = options
        self.reading = reading
        self.report = report
        self.seen: set[bytes] = set()
        self.dropped: Counter[str] = Counter(duplicate=0, empty=0, unreadable=0)
        self.text_bytes = 0
        self.pending: list[tuple[str, int]] = []  # split and bytes of documents that are being encoded, in order
        self.taken = 0
        self.counts = {name: Counter() for name in SPLITS}  # type: dict[str, Counter[str]]
        self.lossy = 0

    def batches(self, files: list[tuple[Path, str, int]], held_out: Any) -> Iterator[list[str]]:
        """Batches of documents to encode: duplicates and empty ones dropped, up to the limit. Held-out text is
        written on the way.
        """
        batch: list[str] = []
        size = done = 0
        total = sum(item[2] for item in files)
        for path, form, file_bytes in files:
            for text in documents(path, form, self.reading):
                digest, length = _digest(text)
                if not length or digest in self.seen:
                    self.dropped["empty" if not length else "duplicate"] += 1
                    continue
                if self.options.limit_bytes is not None and self.text_bytes >= self.options.limit_bytes:
                    if batch:
                        yield batch
                    return
                self.seen.add(digest)
                self.text_bytes += length
                split = split_of(digest, self.options.seed, self.options.validation)
                if split == "validation":
                    held_out.write(text.encode())
                self.pending.append((split, length))
                batch.append(text)
                size += length
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            done += file_bytes
            self.report("encoding", done, total)
        if batch:
            yield batch

    def add(self, encoded: Encoded, builders: dict[str, Any]) -> None:
        """Writes one encoded batch."""
        ends = np.cumsum(encoded.lengths)
        for end, length, text_bytes in zip(ends, encoded.lengths, encoded.text_bytes):
            split, expected = self.pending[self.taken]
            self.taken += 1
            builders[split].add_document(encoded.ids[end - length : end], [int(length)])
            count = self.counts[split]
            count.update(documents=1, tokens=int(length), bytes=expected)
            count["longest"] = max(count["longest"], int(length))
            self.lossy += int(text_bytes) != expected
        if self.taken > 4096:
            del self.pending[: self.taken]
            self.taken = 0


def prepare(options: PrepareOptions, report: Report | None = None) -> manifests.Manifest:
    """Writes the folder `options.output` completely or not at all, and returns its manifest.

    Raises ValueError (what was asked cannot be done), DataError (missing or unreadable input) or PrepareFailure (no
    space).
    """
    report = report or (lambda stage, done, total: None)
    check_output(options.output, options.overwrite)
    files = [
        (path, format_of(path, options.format), path.stat().st_size) for path in expand(options.input, options.exclude)
    ]
    if options.limit_bytes is not None:
        # The first files by name are one corner of a corpus; a shuffle by number takes from all of it.
        files = [files[i] for i in permutation(len(files), options.seed)]
    if options.tokenizer is not None:
        Tokenizer(options.tokenizer).eos  # noqa: B018  (fails early if it is no tokenizer)
    try:
        with staged(options.output) as folder:
            return _write(folder, files, options, report)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise PrepareFailure(f"writing {options.output} failed: {error}; nothing was left behind") from error
        parent = next(p for p in options.output.absolute().parents if p.exists())
        need = sum(item[2] for item in files)
        raise PrepareFailure(
            f"no space for {options.output} ({error.strerror}): up to {need / 1e6:.1f} MB are needed, "
            f"{shutil.disk_usage(parent).free / 1e6:.1f} MB are free (a quota may allow less); "
            f"nothing was left behind. Free some space, name another `--output`, or pass `--limit-bytes`"
        ) from None


def _write(
    folder: Path, files: list[tuple[Path, str, int]], options: PrepareOptions, report: Report
) -> manifests.Manifest:
    # megatron-core takes seconds to import; the tokenizer trains meanwhile.
    threading.Thread(target=indexed_dataset, daemon=True).start()
    cache = folder / ".cache"
    model = folder / "tokenizer.model"
    if options.tokenizer is None:
        texts = sample(files, options, options.reading(cache), report)
        if not texts:
            _refuse_empty(files, options)
        report("training the tokenizer", 0, 0)
        train(texts, options.vocabulary, model)
        del texts
    else:
        shutil.copyfile(options.tokenizer, model)
    tokenizer = Tokenizer(model)
    megatron = indexed_dataset()
    dtype = megatron.DType.optimal_dtype(tokenizer.vocabulary_size)
    builders = {name: megatron.IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype) for name in SPLITS}
    reading = options.reading(cache)
    writer = _Writer(folder, options, reading, report)
    with contextlib.ExitStack() as closing:
        for builder in builders.values():
            closing.callback(builder.data_file.close)
        held_out = closing.enter_context((folder / "validation_text.bin").open("wb"))
        for encoded in encode_all(writer.batches(files, held_out), model, options.workers):
            interruption.check()
            writer.add(encoded, builders)
    for name, builder in builders.items():
        builder.finalize(str(folder / f"{name}.idx"))
    writer.dropped["unreadable"] = reading.undecodable
    _require_splits(writer, files, options)
    shutil.rmtree(cache, ignore_errors=True)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes)
    if not options.validation:
        for name in ("validation.bin", "validation.idx", "validation_text.bin"):
            (folder / name).unlink()
    return _describe(folder, writer, tokenizer, np.dtype(dtype), len(files), options)


def _refuse_empty(files: list[tuple[Path, str, int]], options: PrepareOptions) -> None:
    if options.validation and any(item[2] for item in files):
        raise DataError(
            f"no training text in {len(files)} files: they are empty, unreadable, or all fell to validation; "
            f"lower `--validation {options.validation}`, or cut long documents with `--document-bytes 65536`"
        )
    raise DataError(f"no text in {len(files)} files: all are empty or unreadable; check --input and --text-field")


def _require_splits(writer: _Writer, files: list[tuple[Path, str, int]], options: PrepareOptions) -> None:
    if not writer.counts["train"]["documents"]:
        _refuse_empty(files, options)
    if options.validation and not writer.counts["validation"]["documents"]:
        found = writer.counts["train"]["documents"]
        raise UsageError(
            f"none of the {found} documents fell to validation with share {options.validation} and seed "
            f"{options.seed}: raise `--validation`, cut long documents with `--document-bytes 65536`, change `--seed`, "
            f"or pass `--validation 0`"
        )


def _describe(
    folder: Path, writer: _Writer, tokenizer: Tokenizer, dtype: np.dtype, files: int, options: PrepareOptions
) -> manifests.Manifest:
    splits = {
        name: manifests.SplitRecord(
            documents=count["documents"],
            tokens=count["tokens"],
            bytes=count["bytes"],
            bytes_per_token=round(count["bytes"] / count["tokens"], 4),
            longest_document=count["longest"],
        )
        for name, count in writer.counts.items()
        if count["documents"]
    }
    records = {
        path.name: manifests.hash_file(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }
    manifest = manifests.Manifest(
        dtype=dtype.name,
        splits=splits,
        tokenizer=manifests.TokenizerRecord(
            vocabulary_size=tokenizer.vocabulary_size,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            xxh3_128=records["tokenizer.model"].xxh3_128,
            trained=options.tokenizer is None,
            lossless=writer.lossy == 0,
        ),
        files=records,
        input_files=files,
        dropped=dict(writer.dropped),
        settings={
            "input": options.input,
            "exclude": options.exclude,
            "format": options.format,
            "text_field": options.text_field,
            "validation": options.validation,
            "seed": options.seed,
            "limit_bytes": options.limit_bytes,
            "sample_bytes": options.sample_bytes if options.tokenizer is None else None,
            "document_bytes": options.document_bytes,
            "on_bad": options.on_bad,
        },
    )
    (folder / manifests.NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest
