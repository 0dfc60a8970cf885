"""What `python -m pretrain.checkpoint` does, as functions that print and return an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint.folder import Entry
from pretrain.exit import ERROR, FINISHED, NO_CHECKPOINT

if TYPE_CHECKING:
    from pretrain.checkpoint.storage import Spec

BATCH_BYTES = 1 << 28  # verify reads this much at a time


def list_(path: Path) -> int:
    """A table of a run's checkpoints, newest first. Returns 78 if there are some and none is complete."""
    found = _find(path)
    if not found:
        print(f"{path}: no checkpoints yet")
        return FINISHED
    newest = next((entry for entry in found if not entry.fault), None)
    table = Table("checkpoint", "step", "saved (UTC)", "ranks", "size", "state", box=None, pad_edge=False)
    for entry in found:
        record = entry.record
        state = f"damaged: {entry.fault}" if entry.fault else "newest" if entry is newest else "complete"
        table.add_row(
            entry.path.name,
            str(entry.step),
            str(record.get("saved_at", "")).replace("T", " ").removesuffix("+00:00"),
            str(record.get("world", "")),
            _size(entry.bytes),
            Text(state, style="red" if entry.fault else "green" if entry is newest else ""),
        )
    _console().print(table)
    return FINISHED if newest else NO_CHECKPOINT


def inspect(path: Path, *, tensors: bool = False) -> int:
    """What one checkpoint holds: of a run, its newest complete one. Returns 1 if the checkpoint is damaged."""
    from pretrain.checkpoint import storage
    from pretrain.checkpoint.errors import CheckpointError

    entry = on_disk.inspect(path)
    if entry is None:
        _find(path)
        good = on_disk.loadable(on_disk.resolve(path), _warn)
        if not good:
            raise ValueError(f"{path}: no checkpoints yet")
        entry = good[0]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("checkpoint", str(entry.path))
    table.add_row("state", Text(f"damaged: {entry.fault}", style="red") if entry.fault else Text("complete"))
    record = entry.record
    if record:
        table.add_row("step", str(entry.step))
        table.add_row("saved", str(record.get("saved_at", "")))
        table.add_row("ranks", f"{record['world']}, each with {', '.join(record.get('per_rank', [])) or 'nothing'}")
        table.add_row("size", f"{_size(entry.bytes)} in {len(record['files'])} files")
        for key, value in record["meta"].items():
            table.add_row(key, "(in meta.json)" if isinstance(value, dict) else Text(str(value)))
    try:
        stored = storage.contents(entry.path)
    except CheckpointError as error:
        _console().print(table)
        _warn(str(error))
        return ERROR
    sections: dict[str, list[Spec]] = {}
    for name, spec in stored.items():
        sections.setdefault(name.split("/", 1)[0], []).append(spec)
    for section, specs in sorted(sections.items()):
        table.add_row(section, f"{len(specs)} tensors, {_size(sum(spec.bytes for spec in specs))}")
    _console().print(table)
    if tensors:
        names = Table("tensor", "dtype", "shape", box=None, pad_edge=False)
        for name, spec in sorted(stored.items()):
            names.add_row(Text(name), str(spec.dtype).removeprefix("torch."), Text(str(list(spec.shape))))
        _console().print()
        _console().print(names)
    return ERROR if entry.fault else FINISHED


def verify(path: Path) -> int:
    """Read every tensor of a checkpoint, or of all checkpoints of a run. Returns 1 if some are bad, 78 if all are."""
    one = on_disk.inspect(path)
    found = [one] if one is not None else _find(path)
    if not found:
        print(f"{path}: no checkpoints yet")
        return FINISHED
    bad = 0
    for entry in found:
        faults = [entry.fault] if entry.fault else faults_of_tensors(entry.path)
        bad += bool(faults)
        print(f"{entry.path}: {'damaged' if faults else 'good, ' + _size(entry.bytes)}")
        for fault in faults[:20]:
            print(f"  {fault}")
        if len(faults) > 20:
            print(f"  and {len(faults) - 20} more")
    return FINISHED if not bad else NO_CHECKPOINT if bad == len(found) else ERROR


def export(path: Path, out: Path, form: str, dtype: Literal["fp32", "bf16"], shard_bytes: int) -> int:
    """Write a model as a Hugging Face folder. Returns 0; what hinders it is raised."""
    from pretrain.checkpoint.interop.export import export

    done = export(path, out, form, dtype, shard_bytes)
    for note in done.notes:
        _warn(f"note: {note}")
    print(f"{done.folder}: {done.checkpoint.name} as {done.form.architecture} ({done.form.name}), {_size(done.bytes)}")
    return FINISHED


def import_(path: Path, out: Path) -> int:
    """Make a run folder of a Hugging Face folder. Returns 0; what hinders it is raised."""
    from pretrain.checkpoint.interop.intake import intake

    done = intake(path, out)
    for note in done.notes:
        _warn(f"note: {note}")
    print(f"{done.checkpoint}: {done.form.title}, {done.tensors} tensors")
    return FINISHED


def faults_of_tensors(path: Path) -> list[str]:
    """Read all bytes stored at `path`: a line for each damaged block; if there is none, for each tensor with NaN or infinity."""
    import torch

    from pretrain.checkpoint import storage
    from pretrain.checkpoint.errors import CheckpointError
    from pretrain.checkpoint.planned import Reader

    def not_finite(names: list[str]) -> list[str]:
        tensors = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in names}
        storage.read(path, tensors, subset=True)
        bad = [(n, int((~t.isfinite()).sum())) for n, t in tensors.items() if t.is_floating_point()]
        return [f"{name}: {count} of {tensors[name].numel()} numbers are not finite" for name, count in bad if count]

    try:
        if faults := Reader(path).check():
            return faults
        stored = storage.contents(path)
        batch: list[str] = []
        size = 0
        for name in sorted(stored):
            batch.append(name)
            size += stored[name].bytes
            if size >= BATCH_BYTES:
                faults += not_finite(batch)
                batch, size = [], 0
        return faults + (not_finite(batch) if batch else [])
    except CheckpointError as error:
        return [str(error)]


def _find(path: Path) -> list[Entry]:
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such folder; give a run folder such as runs/quickstart, or one of its checkpoints"
        )
    return on_disk.entries(on_disk.resolve(path))


def _size(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _console() -> Console:
    # In a pipe rich assumes 80 columns and cuts names short, which no script wants.
    return Console() if sys.stdout.isatty() else Console(width=240)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
