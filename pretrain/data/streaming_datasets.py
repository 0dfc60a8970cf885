"""Units of a Hugging Face data set: its shards where rows are streamed, ranges of rows where they lie on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.errors import DataError, UsageError
from pretrain.data.streaming_units import Block, Policy

ROWS = 256  # in a block, and in a unit of a data set on this machine
FEW = 64  # shards; below it Parquet files are cut into row groups, for which all their ends are fetched


class Dataset:
    """name: of a data set on the hub, or a folder (also one that `save_to_disk` wrote). subset: the name of one of its
    configurations. remote: rows are fetched as they are read, otherwise it is downloaded before.

    A streamed data set's unit is one of its shards: its files or, of few Parquet files, their row groups. To begin in the midst
    of a shard the rows before it are fetched again, though not made into tokens.
    Raises UsageError if it cannot be opened (also for want of a network), or if it has no such split or field.
    """

    def __init__(self, name: str, subset: str | None, split: str, remote: bool, policy: Policy) -> None:
        self.name, self.subset, self.split, self.remote, self.policy = name, subset, split, remote, policy
        self.bad = 0
        self._opened: Any = None
        self._saved = (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file()
        opened = self._open()
        self.streamed = not hasattr(opened, "num_rows")
        self._count = opened.num_shards if self.streamed else -(-opened.num_rows // ROWS)
        names = list(opened.column_names or [])
        if names and policy.text_field not in names:
            raise UsageError(f"{policy.missing(names, f'data set {name}')}. Name one as stream.text_field")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each process opens it itself

    def _open(self) -> Any:
        if self._opened is None:
            self._opened = self._load()
        return self._opened

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UsageError(f"data set {self.name} needs the datasets package: pip install datasets") from None
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            if self._saved:
                found = datasets.load_from_disk(self.name)
                return found[self.split] if hasattr(found, "keys") else found
            opened = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=self.remote)
            return opened.reshard() if self.remote and opened.num_shards < FEW else opened
        except Exception as error:  # the library, and those below it, raise anything
            raise UsageError(
                f"data set {self.name} (configuration {self.subset or 'default'}, split {self.split}) cannot be opened: "
                f"{_short(error)}; check the names and the network, or name a folder that holds it"
            ) from None

    @property
    def count(self) -> int:
        return int(self._count)

    @property
    def identity(self) -> object:
        opened = self._open()
        splits = getattr(opened.info, "splits", None) or {}
        rows = getattr(splits.get(self.split), "num_examples", None) if self.streamed else opened.num_rows
        name = Path(self.name).name if Path(self.name).exists() else self.name
        return [name, self.subset, self.split, self.count, rows]

    def where(self, unit: int, at: int) -> str:
        return f"data set {self.name} {f'shard {unit} ' if self.streamed else ''}row {at}"

    def blocks(self, unit: int, first: int) -> Iterator[Block]:
        opened = self._open()
        if not self.streamed:
            if first == 0:
                rows = opened.select(range(unit * ROWS, min((unit + 1) * ROWS, opened.num_rows)))
                yield self._block(self._column(rows.with_format("arrow")[:]), unit, unit * ROWS)
            return
        number = 0
        try:
            shard = opened.shard(num_shards=self.count, index=unit).with_format("arrow")
            for table in shard.iter(batch_size=ROWS):
                if number >= first:
                    yield self._block(self._column(table), unit, number * ROWS)
                number += 1
        except (DataError, UsageError, GeneratorExit):
            raise
        except Exception as error:
            # A network that fails is no corrupt row: what it withholds now would be there the next time.
            where = self.where(unit, number * ROWS)
            if not isinstance(error, (ValueError, UnicodeError)):
                raise DataError(
                    f"{where} and those after it cannot be fetched: {_short(error)}; run again when they can be"
                ) from error
            self.policy.bad(
                f"{where} and those after it in the shard are not readable: {_short(error)}", "mend the file"
            )
            yield Block(bad=1)

    def _column(self, table: Any) -> list[Any]:
        if self.policy.text_field not in table.column_names:
            what = self.policy.missing(list(table.column_names), f"data set {self.name}")
            raise UsageError(f"{what}. Name one as stream.text_field")
        found: list[Any] = table.column(self.policy.text_field).to_pylist()
        return found

    def _block(self, values: list[Any], unit: int, first: int) -> Block:
        return Block(list(enumerate(values, first)), partial(self._row, unit))

    def _row(self, unit: int, at: int, value: object) -> str | None:
        return self.policy.text(value, self.where(unit, at))


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
