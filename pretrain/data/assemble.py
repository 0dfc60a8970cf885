"""From folders of finished units to the output folder: what is there, what is missing, and the manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import manifest as manifests
from pretrain.data.errors import DataError, UsageError
from pretrain.data.merge import Chosen, Pairs, write
from pretrain.data.parts import Parts, UnitRecord, differences
from pretrain.data.staging import check_output, staged
from pretrain.data.tokenizer import Tokenizer, fingerprint, install
from pretrain.data.writer import dtype_for

Report = Callable[..., None]


class NoText(DataError):
    """There is nothing to write."""

    @staticmethod
    def of(settings: dict[str, Any], files: int, any_input: bool) -> NoText:
        """The complaint, with what may help."""
        where = f"{files} files" if not settings.get("datasets") else "the datasets"
        if settings["validation"] and any_input:
            return NoText(
                f"no training text in {where}: they are empty, unreadable, filtered out, or all fell to validation; "
                f"lower `--validation {settings['validation']}`, or cut long documents with `--document-bytes 65536`"
            )
        return NoText(f"no text in {where}: all are empty or unreadable; check --input and --text-field")


class NoValidation(UsageError):
    """Nothing fell to the validation split."""


def merge(
    folders: Sequence[Path], output: Path, overwrite: bool = False, keep: bool = False, report: Report | None = None
) -> manifests.Manifest:
    """Merges finished units, all shards together, into `output`, and removes them unless `keep`.

    Raises ValueError if shards of different settings are given, DataError if units are missing or damaged.
    """
    check_output(output, overwrite)
    parts = [Parts(folder) for folder in folders]
    for each in parts:
        if each.record() is None:
            raise DataError(
                f"{each.folder} holds no units; make them with `python -m pretrain.data prepare --shard i/n`"
            )
    with contextlib.ExitStack() as closing:
        for each in parts:
            closing.enter_context(each.locked())
        manifest = assemble(parts, output, report or (lambda stage, done, total, note="": None))
        if not keep:
            for each in parts:
                each.discard()
    return manifest


def assemble(parts: Sequence[Parts], output: Path, report: Report) -> manifests.Manifest:
    """Writes `output` completely or not at all. Raises as `merge`, whose locks the caller holds."""
    record = _agreed(parts)
    settings = dict(record["settings"])
    units, missing = _units(parts)
    if missing and settings["limit_bytes"] is None:
        named = ", ".join(entry["name"] for entry in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(missing) + len(units)} units are missing ({named}): prepare the shards that lack "
            "them, or name their folders with --parts"
        )
    source = parts[0].tokenizer
    if fingerprint(source) != record["tokenizer"]:
        raise DataError(f"{source} is damaged: its hash is not that of the record beside it; prepare again")
    with staged(output) as folder:
        model = install(source, folder)
        tokenizer = Tokenizer(model)
        dtype = dtype_for(tokenizer.vocabulary_size)
        report("choosing documents", 0, 0)
        chosen = Chosen(units, dtype.itemsize)
        if settings["limit_bytes"] is not None and not chosen.limit(settings["limit_bytes"]) and missing:
            raise DataError(f"{len(missing)} units are missing, and the limit is not reached without; prepare again")
        if near := settings.get("near_duplicates"):
            chosen.drop_near_duplicates(near["threshold"], folder)
        total = sum(run.record.bytes["tokens"] for run in chosen.runs)
        pairs = write(chosen, settings["shuffle"], folder, dtype, lambda done: report("writing", done, total))
        files = parts[0].plan()["files"]
        _require_splits(pairs, settings, files, any(entry["size"] for entry in parts[0].plan()["units"]))
        np.save(folder / "token_bytes.npy", tokenizer.token_bytes)
        if not settings["validation"]:
            for name in ("validation.bin", "validation.idx", "validation_text.bin"):
                (folder / name).unlink()
        report("hashing", 0, 0)
        return _describe(folder, pairs, tokenizer, chosen.dropped(), files, settings)


def _agreed(parts: Sequence[Parts]) -> dict[str, Any]:
    """The record that all folders share."""
    first = parts[0].record()
    assert first is not None
    for other in parts[1:]:
        record = other.record()
        assert record is not None
        differing = differences(first["settings"], record["settings"])
        if record["tokenizer"] != first["tokenizer"]:
            differing.append(f"the tokenizer was {first['tokenizer']}, is {record['tokenizer']}")
        mine, others = (tuple(unit["key"] for unit in each.plan()["units"]) for each in (parts[0], other))
        if not differing and mine != others:
            differing.append("the input files were not the same, or of other sizes")
        if differing:
            raise UsageError(
                f"{parts[0].folder} and {other.folder} cannot be merged: {'; '.join(differing)}; prepare all shards with "
                "the same command"
            )
    return first


def _units(parts: Sequence[Parts]) -> tuple[list[tuple[UnitRecord, Path]], list[dict[str, Any]]]:
    """(finished units in order, units that are missing). With a gap, and a limit, what follows the gap does not count."""
    found: list[tuple[UnitRecord, Path]] = []
    missing: list[dict[str, Any]] = []
    first = parts[0].record()
    assert first is not None
    gap_ends = first["settings"]["limit_bytes"] is not None
    for entry in parts[0].plan()["units"]:
        for each in parts:
            record = each.finished(entry["key"])
            if record is not None:
                break
        if record is None or (missing and gap_ends):
            missing.append(entry)
        else:
            found.append((record, each.unit_folder(entry["key"])))
    return found, missing


def _require_splits(pairs: Pairs, settings: dict[str, Any], files: int, any_input: bool) -> None:
    if not pairs.counts["train"]["documents"]:
        raise NoText.of(settings, files, any_input)
    if settings["validation"] and not pairs.counts["validation"]["documents"]:
        raise NoValidation(
            f"none of the {pairs.counts['train']['documents']} documents fell to validation with share "
            f"{settings['validation']} and seed {settings['seed']}: raise `--validation`, cut long documents with "
            "`--document-bytes 65536`, change `--seed`, or pass `--validation 0`"
        )


def _describe(
    folder: Path, pairs: Pairs, tokenizer: Tokenizer, dropped: dict[str, int], files: int, settings: dict[str, Any]
) -> manifests.Manifest:
    trained = settings.pop("trained")
    del settings["unit_bytes"]
    splits = {
        name: manifests.SplitRecord(
            documents=count["documents"],
            tokens=count["tokens"],
            bytes=count["bytes"],
            bytes_per_token=round(count["bytes"] / count["tokens"], 4),
            longest_document=count["longest"],
        )
        for name, count in pairs.counts.items()
        if count["documents"]
    }
    records = {
        path.name: manifests.hash_file(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }
    manifest = manifests.Manifest(
        dtype=pairs.dtype.name,
        splits=splits,
        tokenizer=manifests.TokenizerRecord(
            vocabulary_size=tokenizer.vocabulary_size,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            xxh3_128=records["tokenizer.model"].xxh3_128,
            trained=trained is not None,
            lossless=pairs.lossless,
        ),
        files=records,
        input_files=files,
        dropped=dropped,
        settings=settings,
    )
    (folder / manifests.NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest
