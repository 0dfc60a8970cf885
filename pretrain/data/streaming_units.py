"""What text is read in when it is not prepared first: units, each of which can be read without those before it.

A unit is a stretch of a file or a shard of a data set, and consists of blocks of rows. Nothing about a unit but its place
is known before it is read, so the number of its documents and tokens never matters to finding one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pretrain.data.errors import DataError


@dataclass(frozen=True)
class Text:
    """A document. at: where in its unit: a byte or a row, see Units.where."""

    text: str
    at: int


@dataclass
class Block:
    """Rows that are read, and shuffled, together. bad: how many were left out as unreadable."""

    texts: list[Text] = field(default_factory=list)
    bad: int = 0


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

    def bad(self, block: Block, message: str, fix: str) -> None:
        if not self.skip_bad:
            raise DataError(f"{message}; {fix}, or set data.on_bad=skip")
        block.bad += 1

    def add(self, block: Block, value: object, at: int, where: str) -> None:
        """Adds a row's text to a block. None is an empty text."""
        if value is None:
            value = ""
        if isinstance(value, str):
            try:
                value.encode()  # a lone surrogate is valid JSON but not text
                block.texts.append(Text(value, at))
                return
            except UnicodeEncodeError as error:
                self.bad(block, f"{where} is not UTF-8 ({error.reason})", "mend the row")
                return
        what = f"{where}: field {self.text_field!r} holds {type(value).__name__}, not text"
        self.bad(block, what, "name another text_field")

    def missing(self, names: list[str], where: str) -> str:
        return f"{where} has no field {self.text_field!r}; its fields are: {', '.join(sorted(names)) or 'none'}"
