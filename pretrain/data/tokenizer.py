"""SentencePiece, made lossless: decode(encode(text)) == text for every text that UTF-8 can hold."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.errors import DataError, UsageError

# SentencePiece writes a space as U+2581 inside its pieces and cannot tell it from a U+2581 in the text.
SPACE = "\u2581"
_SPACE_BYTES = SPACE.encode()


class Tokenizer:
    """A SentencePiece .model file, loaded at first use (so it can be handed to other processes by path).

    Raises DataError if the file cannot be loaded, ValueError if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"no tokenizer at {self.path}; give the path of a SentencePiece .model file")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{self.path} is not a SentencePiece model ({error}); give a .model file, or let `prepare` train one"
            ) from None
        return processor

    @cached_property
    def _space_ids(self) -> list[int]:
        """Ids that spell U+2581 byte by byte; empty if the model has no byte pieces or adds a space to each text."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_BYTES]
        prefixed = int(self.token_bytes[self._processor.encode("x")].sum()) != 1
        return ids if all(self._processor.is_byte(i) for i in ids) and not prefixed else []

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return int(self._processor.vocab_size())

    @property
    def bos(self) -> int:
        """The id that begins a document (the end-of-document id, if the model has no beginning)."""
        found = int(self._processor.bos_id())
        return found if found >= 0 else self.eos

    @property
    def eos(self) -> int:
        """The id that ends a document. Raises ValueError if the model has none."""
        found = int(self._processor.eos_id())
        if found < 0:
            raise UsageError(f"{self.path} has no end-of-sentence piece, which separates documents; train it with one")
        return found

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocabulary]: bytes of text that each id stands for; 0 for bos, eos, unknown and other control ids."""
        processor = self._processor
        table = np.zeros(self.vocabulary_size, np.int32)
        for i in range(self.vocabulary_size):
            if processor.is_byte(i):
                table[i] = 1
            elif not (processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)):
                table[i] = len(processor.id_to_piece(i).replace(SPACE, " ").encode())
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        if SPACE not in text or not self._space_ids:
            return self._processor.encode(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += self._space_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a model may sample such) become U+FFFD."""
        return self._processor.decode(ids)

    def piece(self, token: int) -> str:
        """One id, printable: control ids by name, others as a quoted string."""
        name = str(self._processor.id_to_piece(token))
        if self._processor.is_control(token) or self._processor.is_byte(token) or self._processor.is_unknown(token):
            return name
        return repr(name.replace(SPACE, " "))
