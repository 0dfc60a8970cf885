"""What text is read in when it is not prepared first: units, each of which can be read without those before it.

A unit is a stretch of a file or a shard of a data set, and consists of blocks of rows. Nothing about a unit but its place
is known before it is read, so the number of its documents and tokens never matters to finding one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.data.errors import DataError


@dataclass(frozen=True)
class Text:
    """A document. at: where in its unit: a byte or a row, see Units.where."""

    text: str
    at: int


@dataclass(frozen=True)
class Block:
    """Rows that are found, and shuffled, together. They are decoded one by one, so that a block can be begun anywhere.

    rows: where each is, and what is there. decode: makes a row's text of these, None of one that is left out as
    unreadable; raises DataError. bad: rows that were left out before.
    """

    rows: Sequence[tuple[int, Any]] = ()
    decode: Callable[[int, Any], str | None] = lambda at, raw: raw
    bad: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Text | None:
        at, raw = self.rows[row]
        text = self.decode(at, raw)
        return None if text is None else Text(text, at)

    @property
    def texts(self) -> list[Text]:
        """All of it that can be read."""
        return [text for text in map(self.read, range(len(self))) if text is not None]


class Units(Protocol):
    """A corpus of text in units. It can be pickled; files are opened where they are read.

    bad: units or files that were left out as unreadable when the corpus was opened.
    """

    bad: int

    @property
    def count(self) -> int:
        """Units."""
        ...

    @property
    def identity(self) -> object:
        """Plain values that name the text without reading it."""
        ...

    def blocks(self, unit: int, first: int) -> Iterator[Block]:
        """The blocks of a unit from number `first` on. Raises DataError."""
        ...

    def where(self, unit: int, at: int) -> str:
        """The place of a document, for people."""
        ...


@dataclass
class Policy:
    """skip_bad: unreadable rows are left out and counted, instead of a DataError."""

    text_field: str = "text"
    skip_bad: bool = False

    def bad(self, message: str, fix: str) -> str | None:
        """The text of something unreadable, None: it is left out. Raises DataError where it may not be."""
        if self.skip_bad:
            return None
        raise DataError(f"{message}; {fix}, or set data.on_bad=skip")

    def text(self, value: object, where: str) -> str | None:
        """The text in a row's field; nothing there is an empty text. None if it is to be left out."""
        if value is None:
            return ""
        if not isinstance(value, str):
            what = f"{where}: field {self.text_field!r} holds {type(value).__name__}, not text"
            return self.bad(what, "name another text_field")
        try:
            value.encode()  # a lone surrogate is valid JSON but not text
        except UnicodeEncodeError as error:
            return self.bad(f"{where} is not UTF-8 ({error.reason})", "mend the row")
        return value

    def missing(self, names: list[str], where: str) -> str:
        return f"{where} has no field {self.text_field!r}; its fields are: {', '.join(sorted(names)) or 'none'}"
