"""Text to token ids and back: a SentencePiece .model, made lossless, or a tokenizer.json of the `tokenizers` library."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from pretrain.data.errors import DataError, UsageError
from pretrain.data.pieces import SPACE, Pieces
from pretrain.data.seal import sealed

SETTINGS = "tokenizer_config.json"


def is_json(path: Path) -> bool:
    """Whether a tokenizer file is a tokenizer.json, whatever it is called. A .model file begins with the number of a field."""
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def find(path: str | Path) -> Path:
    """The tokenizer file that `path` is, or that lies in the folder of a Hugging Face model (or a run, or a corpus).

    Of a folder with both kinds tokenizer.model is taken, unless it is not SentencePiece's or tokenizer.json has more ids.
    Raises ValueError if there is none, DataError if it is damaged.
    """
    path = Path(path)
    if path.is_file():
        return path
    model, written = path / "tokenizer.model", path / "tokenizer.json"
    if model.is_file() and written.is_file() and not is_json(model):
        try:
            return written if _Json(written).size > Pieces(model).size else model
        except DataError:
            if sealed(model.read_bytes()) is not None:
                raise
            return written
    for name in (model, written):
        if name.is_file():
            return name
    if not path.is_dir():
        raise UsageError(
            f"no tokenizer at {path}; give a SentencePiece .model file, a tokenizer.json, or a folder with one"
        )
    hint = (
        "; it has the vocab.json of an older kind: save it once with `tokenizer = transformers.AutoTokenizer."
        f"from_pretrained({str(path)!r}); tokenizer.save_pretrained({str(path)!r})`"
    )
    raise UsageError(
        f"{path} has neither tokenizer.model nor tokenizer.json{hint * (path / 'vocab.json').is_file()}; give a folder that "
        "has one"
    )


def install(source: str | Path, folder: Path) -> Path:
    """Copies a tokenizer (see `find`) into `folder`, where it is called tokenizer.model whatever its kind; returns its path.

    With it goes the tokenizer_config.json beside a tokenizer.json, which names bos and eos. Raises as `find`.
    """
    file, target = find(source), folder / "tokenizer.model"
    if file.resolve() == target.resolve():
        return target
    shutil.copyfile(file, target)
    settings = file.with_name(SETTINGS)
    if is_json(file) and settings.is_file():
        shutil.copyfile(settings, folder / SETTINGS)
    return target


def fingerprint(path: Path) -> str:
    """xxh3_128 (hexadecimal) of a tokenizer file: what manifests and checkpoints know it by."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


class Tokenizer:
    """A tokenizer file, loaded at first use (so it can be handed to other processes by path).

    path: a file, or a folder that has one (see `find`).
    With a SentencePiece .model, decode(encode(text)) == text for every text that UTF-8 can hold, unless the model normalises
    or lacks byte pieces; a tokenizer.json keeps its own promises. Its names for bos and eos come from tokenizer_config.json
    beside it. Raises DataError if the file cannot be loaded or does not fit its seal, ValueError if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @cached_property
    def _words(self) -> _Words:
        return _Json(self.path) if is_json(self.path) else Pieces(self.path)

    @property
    def fingerprint(self) -> str:
        """xxh3_128 of the file."""
        return fingerprint(self.path)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self._words.size

    @property
    def bos(self) -> int:
        """The id that begins a document (the end-of-document id, if the model has no beginning)."""
        found = self._words.bos
        return self.eos if found is None else found

    @property
    def eos(self) -> int:
        """The id that ends a document. Raises ValueError if the model has none."""
        found = self._words.eos
        if found is None:
            raise UsageError(
                f"{self.path} has no end-of-sentence piece, which separates documents; train it with one, or name it as "
                "eos_token in a tokenizer_config.json beside it"
            )
        return found

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocabulary]: bytes of text that each id stands for; 0 for bos, eos, unknown and other control ids."""
        return self._words.bytes_of_ids()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; control ids that are spelled out in it are plain text."""
        return self._words.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a model may sample such) become U+FFFD."""
        return self._words.decode(ids)

    def piece(self, token: int) -> str:
        """One id, printable: control ids by name, others as a quoted string."""
        return self._words.piece(token)


class _Words(Protocol):
    """What a kind of tokenizer file must offer. bos, eos: None if there is none."""

    @property
    def size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    def bytes_of_ids(self) -> np.ndarray: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> str: ...


class _Json:
    """tokenizer.json."""

    # For a file that has travelled without its tokenizer_config.json: what such tokens are usually called.
    USUAL = (
        ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]"),
        ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
    )
    BYTE = re.compile(r"<0x([0-9A-F]{2})>")

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UsageError(f"{path} needs the tokenizers package: pip install tokenizers") from None
        try:
            text = path.read_text(encoding="utf-8")
            self._model = tokenizers.Tokenizer.from_str(text)
            written = json.loads(text)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{path} is not a tokenizer.json ({error}); give one, or a SentencePiece .model file"
            ) from None
        self._model.encode_special_tokens = True  # "</s>" in a text is text
        self._model.no_truncation()
        self._model.no_padding()
        self.size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = written.get("added_tokens") or []
        self._special = {token["id"] for token in added if token.get("special")}
        self._added = {token["id"]: token["content"] for token in added}
        self._byte_level = '"ByteLevel"' in json.dumps([written.get(key) for key in ("pre_tokenizer", "decoder")])
        self.bos, self.eos = self._ends(path)

    def _ends(self, path: Path) -> tuple[int | None, int | None]:
        beside = path.with_name(SETTINGS)
        try:
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
        except ValueError as error:
            raise DataError(f"{beside} cannot be read: {error}") from None
        found: list[int | None] = []
        for key, usual in zip(("bos_token", "eos_token"), self.USUAL):
            named = (settings or {}).get(key)
            named = named.get("content") if isinstance(named, dict) else named
            names = usual if settings is None else [named] if named else []
            ids = [self._model.token_to_id(name) for name in names]
            found.append(next((i for i in ids if i is not None), None))
        return found[0], found[1]

    def bytes_of_ids(self) -> np.ndarray:
        return np.array([self._bytes(i) for i in range(self.size)], np.int32)

    def _bytes(self, token: int) -> int:
        name = self._model.id_to_token(token)
        if name is None or token in self._special:
            return 0
        if token in self._added:
            return len(self._added[token].replace(SPACE, " ").encode())
        if self._byte_level:
            return len(name)  # one character a byte
        return 1 if self.BYTE.fullmatch(name) else len(name.replace(SPACE, " ").encode())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        name = self._model.id_to_token(token)
        if name is None or token in self._special or self.BYTE.fullmatch(name):
            return str(name)
        return repr(name.replace(SPACE, " "))
