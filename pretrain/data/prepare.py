"""Text to a folder of tokens: the tokenizer, `.bin`/`.idx` for each split, the held-out text, and manifest.json.

In two passes. First the input's units are made, on any number of processes and machines, and kept beside the output one
by one; then they are merged. A run that is killed goes on from the units that are finished.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.data import manifest as manifests
from pretrain.data.assemble import NoText, NoValidation, assemble
from pretrain.data.encode import Work, make_all
from pretrain.data.errors import DataError, PrepareFailure, UsageError
from pretrain.data.limit import Prefix
from pretrain.data.options import PrepareOptions
from pretrain.data.order import permutation
from pretrain.data.parts import PLAN, Parts, UnitRecord, folder_of
from pretrain.data.sampling import sample, sources_of
from pretrain.data.sources import expand, format_of
from pretrain.data.staging import check_output
from pretrain.data.tokenizer import Tokenizer, find, fingerprint, install
from pretrain.data.units import File, Unit, plan
from pretrain.data.vocabulary import train

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Report = Callable[..., None]
"""Called with the name of the stage, bytes of input done, bytes of input in all, and perhaps a note about the units."""


@dataclass
class Done:
    """What a run did. units: of its shard; found: finished before; made: by this run; again: of those, because files had
    changed or the unit was damaged. manifest: None for a shard."""

    units: int = 0
    found: int = 0
    made: int = 0
    again: int = 0
    manifest: manifests.Manifest | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = f"{self.units} unit{'s' * (self.units != 1)}: {self.made} made"
        words += f" ({self.again} of them again, because files have changed)" if self.again else ""
        return words + (f", {self.found} found finished" if self.found else "")


def prepare(options: PrepareOptions, report: Report | None = None) -> manifests.Manifest:
    """Writes the folder `options.output` completely or not at all, and returns its manifest.

    Raises ValueError (what was asked cannot be done), DataError (missing or unreadable input) or PrepareFailure (no
    space, a worker killed, another process at work).
    """
    found = run(options, report).manifest
    if found is None:
        raise UsageError("a shard has no manifest: make it with `run`, and merge all of them")
    return found


def run(options: PrepareOptions, report: Report | None = None) -> Done:
    """As `prepare`; or makes the units of one shard, for `assemble.merge`."""
    report = report or (lambda stage, done, total, note="": None)
    parts = Parts(folder_of(options.output))
    done = Done()
    if finished := _finished_before(options, parts):
        return finished
    check_output(options.output, options.overwrite)
    files = [
        (path, format_of(path, options.format), path.stat().st_size)
        for path in (expand(options.input, options.exclude) if options.input else [])
    ]
    if options.limit_bytes is not None:
        # The first files by name are one corner of a corpus; a shuffle by number takes from all of it.
        files = [files[i] for i in permutation(len(files), options.seed)]
    if options.tokenizer is not None:
        options.tokenizer = find(options.tokenizer)
        Tokenizer(options.tokenizer).eos  # noqa: B018  (fails early if it is no tokenizer)
    options.filters.check()
    try:
        with parts.locked("{}-of-{}".format(*(options.shard or (1, 1)))):
            if options.restart:
                _discard_content(parts)
            with _kept(parts, options, done):
                units = plan(files, options.datasets, options.unit_bytes)
                _make(parts, options, files, units, done, report)
                if options.shard is None:
                    done.manifest = assemble([parts], options.output, report)
                    parts.discard()
            return done
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise PrepareFailure(f"writing {options.output} failed: {error}; {_left(parts)}") from error
        raise _no_space(options, parts, files, error) from None


def _finished_before(options: PrepareOptions, parts: Parts) -> Done | None:
    """A run that was killed after its output was complete, but before it had tidied up, has nothing left to do."""
    record = parts.record() if parts.folder.is_dir() and not options.overwrite else None
    if record is None or not (options.output / manifests.NAME).is_file() or options.shard is not None:
        return None
    manifest = manifests.read(options.output)
    if manifest.tokenizer.xxh3_128 != record["tokenizer"] or manifest.settings != options.settings():
        return None
    units = len(parts.plan()["units"]) if (parts.folder / PLAN).is_file() else 0
    parts.discard()
    return Done(units, units, manifest=manifest)


def _discard_content(parts: Parts) -> None:
    for path in parts.folder.iterdir():
        if path.suffix == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _kept(parts: Parts, options: PrepareOptions, done: Done) -> Iterator[None]:
    """After a failure: what is finished stays and is spoken of; a folder with nothing finished goes."""
    try:
        yield
    except BaseException as error:
        if options.shard is None and (not parts.count() or isinstance(error, NoText | NoValidation)):
            parts.discard()
        elif isinstance(error, DataError | PrepareFailure):
            raise type(error)(f"{error}. {_left(parts, done.units)}") from error
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_left(parts, done.units)) from error
        raise


def _left(parts: Parts, units: int | None = None) -> str:
    if not parts.folder.is_dir():
        return "nothing was left behind"
    of_all = f" of {units}" if units else ""
    return f"{parts.count()}{of_all} units are finished and kept in {parts.folder}: the same command goes on from there"


def _no_space(options: PrepareOptions, parts: Parts, files: list[File], error: OSError) -> PrepareFailure:
    parent = next(p for p in options.output.absolute().parents if p.exists())
    need = 2 * sum(size for _, _, size in files)  # the units and what they are merged to
    return PrepareFailure(
        f"no space for {options.output} ({error.strerror}): up to {need / 1e6:.1f} MB are needed, "
        f"{shutil.disk_usage(parent).free / 1e6:.1f} MB are free (a quota may allow less); {_left(parts)}. "
        "Free some space, name another `--output`, or pass `--limit-bytes`"
    )


def _make(
    parts: Parts, options: PrepareOptions, files: list[File], units: list[Unit], done: Done, report: Report
) -> None:
    """Makes the units of this shard that are not finished."""
    settings = options.unit_settings()
    parts.require(settings)
    hashed = _tokenizer(parts, options, files, units, report)
    number, shards = options.shard or (1, 1)
    mine = units[number - 1 :: shards]
    parts.begin(settings, hashed)
    parts.write_plan(units, len(files))
    parts.tidy([unit.key for unit in mine])
    work = Work(
        parts.folder,
        options.reading(),
        options.seed,
        options.validation,
        options.filters if options.filters.active else None,
        options.near_duplicates is not None,
        options.limit_bytes,
    )
    done.units = len(mine)
    total, at = sum(unit.size for unit in mine), 0
    prefix = Prefix(parts, units, options.limit_bytes)
    missing: list[Unit] = []
    notes: list[str] = []
    for unit in mine:
        record = parts.finished(unit.key)
        if record is not None and not _stale(record, unit, options):
            done.found += 1
            at += unit.size
            notes += record.notes
            prefix.add(unit)
        else:
            done.again += parts.unit_folder(unit.key).exists()
            missing.append(unit)
    workers = min(options.workers, len(missing))
    report("encoding", at, total, f"{done.found} of {len(mine)} units")
    for unit, record in make_all(missing, work, parts.tokenizer, workers, prefix.wants_more) if missing else ():
        done.made += 1
        at += unit.size
        notes += record.notes
        prefix.add(unit)
        report("encoding", at, total, f"{done.found + done.made} of {len(mine)} units")
    done.notes = tuple(notes[:20])


def _stale(record: UnitRecord, unit: Unit, options: PrepareOptions) -> bool:
    """Whether a finished unit must be made again: its files were written again, or it skipped what is an error now."""
    return record.stamp != unit.stamp() or (options.on_bad == "error" and record.dropped.get("unreadable", 0) > 0)


def _tokenizer(parts: Parts, options: PrepareOptions, files: list[File], units: list[Unit], report: Report) -> str:
    """Puts the tokenizer into the folder of units, unless it is there; returns its hash. Raises ValueError if the units
    that are there were encoded with another.
    """
    record = parts.record()
    if record is not None and parts.tokenizer.is_file():
        hashed = fingerprint(parts.tokenizer)
        if hashed != record["tokenizer"]:
            raise DataError(
                f"{parts.tokenizer} is damaged: its hash is not that of the record beside it; remove {parts.folder} and "
                "prepare again"
            )
        return fingerprint(options.tokenizer) if options.tokenizer is not None else hashed
    # Under another name until it is complete; several shards may do this at once, with the same result.
    folder = Path(tempfile.mkdtemp(prefix="tokenizer.", suffix=".partial", dir=parts.folder))
    try:
        if options.tokenizer is None:
            reading = options.reading()
            texts = sample(sources_of(files, units, reading), options, reading, report)
            if not texts:
                raise NoText.of(options.settings(), len(files), any(unit.size for unit in units))
            report("training the tokenizer", 0, 0)
            train(
                texts,
                options.vocabulary,
                folder / "tokenizer.model",
                byte_fallback=options.byte_fallback,
                user_symbols=options.user_symbols,
            )
        else:
            install(options.tokenizer, folder)
        for path in sorted(folder.iterdir()):
            path.replace(parts.folder / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return fingerprint(parts.tokenizer)
