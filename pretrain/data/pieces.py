"""A SentencePiece .model: text to ids and back without loss, and quicker on long texts than the library itself."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.data.errors import DataError
from pretrain.data.seal import sealed

# SentencePiece writes a space as U+2581 inside its pieces and cannot tell it from a U+2581 in the text.
SPACE = "\u2581"
_SPACE_BYTES = SPACE.encode()
# Characters that are encoded in one call (see `encode`): of 200 to 16000 the quickest.
_STRETCH = 1000


class Pieces:
    """size: ids. bos, eos: None if there is none. Raises DataError for a file that is none, or does not fit its seal."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        raw = path.read_bytes()
        self._own = sealed(raw)
        if self._own is False:
            raise DataError(
                f"{path} is damaged: it does not fit the hash at its end; copy it again from the corpus or run that it came with"
            )
        try:
            self._processor.LoadFromSerializedProto(raw)
            for i in range(self._processor.vocab_size()):
                self._processor.id_to_piece(i)  # damage may leave what is not UTF-8
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a SentencePiece model ({error}); give a .model file or a tokenizer.json, or let `prepare` "
                "train one"
            ) from None
        self.size = int(self._processor.vocab_size())
        self.bos, self.eos = (
            found if found >= 0 else None for found in (self._processor.bos_id(), self._processor.eos_id())
        )

    @cached_property
    def _space_ids(self) -> list[int]:
        """Ids that spell U+2581 byte by byte; empty if the model has no byte pieces or adds a space to each text."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_BYTES]
        prefixed = int(self.bytes_of_ids()[self._processor.encode("x")].sum()) != 1
        return ids if all(self._processor.is_byte(i) for i in ids) and not prefixed else []

    def bytes_of_ids(self) -> np.ndarray:
        processor = self._processor
        table = np.zeros(self.size, np.int32)
        for i in range(self.size):
            if processor.is_byte(i):
                table[i] = 1
            elif not (processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)):
                table[i] = len(processor.id_to_piece(i).replace(SPACE, " ").encode())
        return table

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        """A space that no piece reaches across, None if that is not known.

        A model that was trained here adds nothing to a text and changes nothing in it, and a space begins a piece: it lies
        inside of one only behind another space, or where a line break or a user-defined symbol brings it.
        """
        if not self._own:
            return None
        pieces = (self._processor.id_to_piece(i) for i in range(self.size))
        inner = {before for piece in pieces for before, after in itertools.pairwise(piece) if after == SPACE}
        return re.compile(f"(?<=[^ {re.escape(''.join(sorted(inner)))}]) ")

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        encode = self._processor.encode
        for number, part in enumerate(text.split(SPACE) if SPACE in text and self._space_ids else [text]):
            if number:
                found += self._space_ids
            # The library takes twice as long for a character of a long text as for one of a short text.
            start, size = 0, len(part)
            while size - start > 2 * _STRETCH and self._border is not None:
                border = self._border.search(part, start + _STRETCH)
                if border is None:
                    break
                found += encode(part[start : border.start()])
                start = border.start()
            found += encode(part[start:] if start else part)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def piece(self, token: int) -> str:
        name = str(self._processor.id_to_piece(token))
        if self._processor.is_control(token) or self._processor.is_byte(token) or self._processor.is_unknown(token):
            return name
        return repr(name.replace(SPACE, " "))
