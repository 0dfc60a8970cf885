"""Hugging Face datasets: by name, or a local folder (of data files, or written by `save_to_disk`); in memory maps or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pretrain.data.errors import DataError, UsageError
from pretrain.data.rows import batch_texts, columns_of, no_field, text_of
from pretrain.data.sources import Reading

_BATCH_ROWS = 512


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset. name: on the hub, or a folder. streaming: read from where it lies instead of downloading it."""

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    revision: str | None = None

    @staticmethod
    def parse(text: str, split: str = "train", streaming: bool = False, revision: str | None = None) -> HubDataset:
        """From `NAME` or `NAME:CONFIG`. Raises ValueError for an empty part."""
        name, colon, config = text.rpartition(":")
        if not colon or Path(text).exists():
            name, config = text, ""
        if not name or (colon and not config and not Path(text).exists()):
            raise UsageError(f"--dataset {text!r} names nothing: pass NAME, NAME:CONFIG or a folder")
        return HubDataset(name, config or None, split, streaming, revision)

    def __str__(self) -> str:
        return f"dataset {self.name}{f':{self.config}' if self.config else ''} ({self.split})"

    def open(self) -> Any:
        """A datasets.Dataset, or datasets.IterableDataset if streaming; the same object each time in a process.

        Raises DataError if it cannot be reached or read, ValueError for a configuration or split that it lacks.
        """
        return _opened(self)

    def shards(self) -> int:
        """Files of a streamed dataset, which can be read independently."""
        return int(self.open().num_shards)

    def identity(self) -> str:
        """Names the content, as far as datasets knows it."""
        found = self.open()
        return f"{found.num_shards} shards" if self.streaming else f"{found._fingerprint} {found.num_rows} rows"


@lru_cache(maxsize=8)
def _opened(dataset: HubDataset) -> Any:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    folder = Path(dataset.name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _saved(folder, dataset)
        return datasets.load_dataset(
            dataset.name,
            dataset.config,
            split=dataset.split,
            streaming=dataset.streaming,
            revision=dataset.revision,
        )
    except (DataError, UsageError):
        raise
    except ConnectionError as error:
        raise DataError(
            f"{dataset} cannot be reached: {_first_line(error)}; without a network, or with HF_HUB_OFFLINE, only what is "
            "already in the cache of datasets can be read: download it before, or pass a local folder as `--dataset`"
        ) from None
    except FileNotFoundError as error:
        raise DataError(
            f"{dataset} was not found: {_first_line(error)}; check the name, log in if it is private, or pass a local folder"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{dataset}: {_first_line(error)}; name a configuration as NAME:CONFIG and one as --split"
        ) from None
    except Exception as error:  # builders, file systems and parsers raise what they like
        raise DataError(f"{dataset} cannot be opened: {type(error).__name__}: {_first_line(error)}") from None


def _saved(folder: Path, dataset: HubDataset) -> Any:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if dataset.split not in found:
            raise UsageError(f"{dataset}: {folder} has the splits {', '.join(found)}; pass one as --split")
        found = found[dataset.split]
    elif dataset.split != "train":
        raise UsageError(f"{dataset}: {folder} was saved without splits; leave --split out")
    if dataset.config is not None:
        raise UsageError(f"{dataset}: {folder} was saved without configurations; pass the folder alone")
    return found.to_iterable_dataset(num_shards=_saved_files(folder, dataset)) if dataset.streaming else found


def _saved_files(folder: Path, dataset: HubDataset) -> int:
    place = folder / dataset.split if (folder / "dataset_dict.json").is_file() else folder
    return max(len(list(place.glob("*.arrow"))), 1)


def dataset_rows(dataset: HubDataset, first: int, last: int, reading: Reading) -> Iterator[str]:
    """The texts of rows [first, last). Raises DataError or ValueError as `reading` says."""
    found = dataset.open()
    require_field(dataset, reading)
    table = found.select_columns(columns_of(found.column_names, reading)).with_format("arrow")
    for start in range(first, last, _BATCH_ROWS):
        end = min(start + _BATCH_ROWS, last)
        try:
            batch = table[start:end]
        except Exception as error:  # damaged files raise what they like
            reading.bad(
                f"{dataset} rows {start} to {end - 1} are not readable: {_first_line(error)}", _MEND, end - start
            )
            continue
        yield from batch_texts(batch, str(dataset), start, reading)


def shard_rows(dataset: HubDataset, shard: int, reading: Reading) -> Iterator[str]:
    """The texts of one shard of a streamed dataset. What cannot be read on is one unreadable document."""
    found = dataset.open()
    require_field(dataset, reading)
    given = 0
    try:
        for row in found.shard(num_shards=found.num_shards, index=shard):
            given += 1
            if reading.text_field not in row:
                raise no_field(str(dataset), reading.text_field, row)
            text = text_of(row[reading.text_field], f"{dataset} shard {shard} row {given}", reading)
            if text is not None:
                reading.note_tag(row)
                yield text
    except (DataError, UsageError):
        raise
    except Exception as error:
        reading.bad(
            f"{dataset} shard {shard} is not readable after {given} rows: {type(error).__name__}: {_first_line(error)}",
            _MEND,
        )


_MEND = "run the same command again, or pass `--on-bad skip`"


def require_field(dataset: HubDataset, reading: Reading) -> None:
    """Raises ValueError if the dataset is known to have no such column."""
    columns = dataset.open().column_names
    if columns is not None and reading.text_field not in columns:
        raise no_field(str(dataset), reading.text_field, columns)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
