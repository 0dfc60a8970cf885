"""One split of a prepared corpus, or a bare Megatron prefix, opened for reading after its files have been checked."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pretrain.data import manifest as manifests
from pretrain.data.errors import DataError, UsageError
from pretrain.data.index import REPAIR, check_size, read_index
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_check import same_tokenizer


class Corpus:
    """Documents of token ids in a memory-mapped `.bin`.

    prefix: path without `.bin`/`.idx`. starts: int64 [documents + 1], tokens before each document. tokens: their sum.
    vocabulary_size: None if a bare prefix was opened without one. token_bytes: int32 [vocabulary], bytes of text per
    token (0 for bos and eos), or None. fingerprint: names the content, so that a checkpoint can refuse another corpus.
    manifest: None for a bare prefix. A multimodal pair's modes are not looked at: as for Megatron's GPTDataset, all its
    tokens are one text.
    """

    streamed: ClassVar[bool] = False
    """Whether its documents are not known before they are read: see streaming.py."""

    def __init__(
        self,
        prefix: Path,
        *,
        vocabulary_size: int | None = None,
        token_bytes: torch.Tensor | None = None,
        tokenizer_path: Path | None = None,
        eos: int | None = None,
        manifest: manifests.Manifest | None = None,
        fingerprint: str | None = None,
    ) -> None:
        # Documents lie back to back, so this is all that finds them.
        header, self.starts = read_index(prefix)
        self.prefix = prefix
        self.dtype = header.dtype
        self.tokens = int(self.starts[-1])
        self.vocabulary_size = vocabulary_size
        self.token_bytes = token_bytes
        self.tokenizer_path = tokenizer_path
        self.eos = eos
        self.manifest = manifest
        self.fingerprint = fingerprint or manifests.fingerprint(prefix)

    def __getstate__(self) -> dict[str, Any]:
        # For a process that reads on its own: it opens the files itself, which is quicker than to be sent what they hold.
        return {key: value for key, value in self.__dict__.items() if key not in ("ids", "lengths", "starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.starts = read_index(self.prefix)[1]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]; not kept by those who do with `starts`."""
        return np.diff(self.starts)

    @cached_property
    def ids(self) -> np.ndarray:
        """All tokens of the file, mapped at the first read. A view without memmap's own slicing, which takes longer."""
        return (
            np.memmap(self.bin_path, self.dtype, mode="r").view(np.ndarray) if self.tokens else np.empty(0, self.dtype)
        )

    @staticmethod
    def open(
        path: str | Path,
        split: str = "train",
        *,
        vocabulary_size: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> Corpus:
        """Opens a folder written by `prepare` (then `split` is "train" or "validation") or a bare Megatron prefix
        (`split` is ignored).

        vocabulary_size, tokenizer: for a bare prefix only; without them ids are not checked and bytes not counted.
        Raises DataError (missing, truncated or inconsistent files) or ValueError (a split that was not prepared).
        """
        path = Path(path)
        pair = any(path.with_name(path.name + end).exists() for end in (".idx", ".bin"))
        # Megatron keeps what it computes from a pair in a folder of the same name.
        if path.is_dir() and not (pair and not (path / manifests.NAME).exists()):
            return _open_prepared(path, split)
        if not pair:
            raise DataError(
                f"{path} is neither a prepared folder nor the prefix of a .bin/.idx pair; "
                f"prepare one with `python -m pretrain.data prepare --input 'GLOB' --output {path}`"
            )
        if tokenizer is None:
            return Corpus(path, vocabulary_size=vocabulary_size)
        opened = Tokenizer(tokenizer)
        corpus = Corpus(
            path,
            vocabulary_size=vocabulary_size or opened.vocabulary_size,
            token_bytes=torch.from_numpy(opened.token_bytes),
            tokenizer_path=Path(tokenizer),
            eos=opened.eos,
        )
        same_tokenizer([corpus], Path(tokenizer), "tokenizer")  # the pair may be a prepared folder's
        return corpus

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    @property
    def bin_path(self) -> Path:
        """The `.bin` file."""
        return self.prefix.with_name(self.prefix.name + ".bin")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was written with. Raises ValueError for a bare prefix opened without one."""
        if self.tokenizer_path is None:
            raise UsageError(f"{self.prefix} has no tokenizer beside it; give its .model file with `tokenizer`")
        return Tokenizer(self.tokenizer_path)

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """`length` token ids (all that follow, if None) of a document from token `start` on, in the file's dtype.

        Raises DataError, naming file and byte, for an id outside the vocabulary.
        """
        first, end = int(self.starts[document]) + start, int(self.starts[document + 1])
        size = end - first if length is None else length
        assert start >= 0 and size >= 0 and first + size <= end, "span outside the document"
        ids = self.raw(first, size)
        self.check_ids(ids, first * self.dtype.itemsize)
        return ids

    def raw(self, first: int, count: int) -> np.ndarray:
        """`count` tokens of the file from its token `first` on, whatever documents they belong to, unchecked."""
        return self.ids[first : first + count]

    def check_ids(self, ids: np.ndarray, offset: int) -> None:
        """Raises DataError if any of `ids`, read from byte `offset` of the `.bin`, is outside the vocabulary, or negative."""
        limit = self.vocabulary_size if self.vocabulary_size is not None else np.iinfo(np.int64).max
        if ids.size == 0 or (int(ids.max()) < limit and int(ids.min()) >= 0):
            return
        first = int(np.argmax((ids >= limit) | (ids < 0)))
        outside = "negative" if self.vocabulary_size is None else f"outside the vocabulary of {self.vocabulary_size}"
        raise DataError(
            f"{self.bin_path}: token id {int(ids[first])} at byte {offset + first * self.dtype.itemsize} is {outside}; "
            f"if the file is damaged {REPAIR}; if it was written with another tokenizer, use that one"
        )


def _open_prepared(folder: Path, split: str) -> Corpus:
    manifest = manifests.read(folder)
    if split not in manifest.splits:
        raise UsageError(
            f"{folder} has no {split!r} split (it has {', '.join(sorted(manifest.splits))}); "
            f"prepare it again with `--validation 0.05 --overwrite`"
        )
    for name in (f"{split}.bin", f"{split}.idx", "tokenizer.model", "token_bytes.npy"):
        check_size(folder / name, manifest.files[name].bytes, f"{manifests.NAME} in the same folder")
    # Small files whose damage would show in the meaning of ids only. The tokens' own hash is checked by `inspect --verify`.
    for name in ("tokenizer.model", "token_bytes.npy", "tokenizer_config.json"):
        if name in manifest.files:
            manifests.check_hash(folder / name, manifest.files[name])
    table = np.load(folder / "token_bytes.npy")
    corpus = Corpus(
        folder / split,
        vocabulary_size=manifest.tokenizer.vocabulary_size,
        token_bytes=torch.from_numpy(table),
        tokenizer_path=folder / "tokenizer.model",
        eos=manifest.tokenizer.eos,
        manifest=manifest,
        fingerprint=manifest.files[f"{split}.bin"].xxh3_128,
    )
    stated = manifest.splits[split]
    if (corpus.documents, corpus.tokens) != (stated.documents, stated.tokens):
        raise DataError(
            f"{corpus.prefix}.idx lists {corpus.documents} documents and {corpus.tokens} tokens, {manifests.NAME} says "
            f"{stated.documents} and {stated.tokens}: the files are from different runs; {REPAIR}"
        )
    # What is wrong with an index on its own has been named by now. This finds the rest, such as a border between two
    # documents that has moved; tokens take too long for every start, `inspect --verify` reads them.
    manifests.check_hash(folder / f"{split}.idx", manifest.files[f"{split}.idx"])
    return corpus
