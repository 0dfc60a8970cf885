"""A checkpoint of ours -> a Hugging Face folder."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint import storage
from pretrain.checkpoint.durable import fsync_folder
from pretrain.checkpoint.interop import shards, vocabulary
from pretrain.checkpoint.interop.form import Format, choose
from pretrain.checkpoint.interop.source import model_config, newest
from pretrain.checkpoint.interop.weights import Absent, Group
from pretrain.model.decoder import DecoderConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH_BYTES = 1 << 28  # read from the checkpoint at a time
PREFIX = "model/"


@dataclass(frozen=True)
class Exported:
    """What was written. notes: lines on what a person should know."""

    folder: Path
    checkpoint: Path
    form: Format
    bytes: int
    notes: list[str]


def export(
    source: Path,
    out: Path,
    form: str = "auto",
    dtype: Literal["fp32", "bf16"] = "fp32",
    limit: int = shards.SHARD_BYTES,
) -> Exported:
    """Write the newest complete checkpoint of a run, or the one named, to a new folder `out`.

    form: a format's name, or auto for the first that can express the model. dtype: of the weights; what is recurrent or routes
    stays fp32 in bf16 folders. limit: bytes of tensors in one file. Tensors pass through memory one file at a time.
    Raises ValueError for a model that the format cannot express and for folders that do not fit, CheckpointError for damage.
    """
    entry = newest(source)
    config = model_config(entry)
    chosen = choose(form, config)
    plan = list(chosen.weights(config))
    _fits(entry.path, plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: nobody takes a half-written folder for a model.
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    fresh.mkdir()
    try:
        ids, notes = vocabulary.export(entry.path.parent.parent, fresh, _elsewhere(entry), config.vocabulary or 0)
        values = _config_json(chosen, config, entry, dtype, ids)
        (fresh / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        size = shards.write(fresh, _theirs(entry.path, plan, DTYPES[dtype]), limit)
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    fsync_folder(out.parent)
    return Exported(out, entry.path, chosen, size, notes + ([chosen.note] if chosen.note else []))


def _elsewhere(entry: on_disk.Entry) -> list[Path]:
    """Where the tokenizer may lie besides the run folder."""
    data = entry.record["meta"]["config"].get("data") or {}
    given, path = data.get("tokenizer"), data.get("path")
    return [Path(given)] if given else [Path(path) / "tokenizer.model"] if path else []


def _config_json(
    form: Format, config: DecoderConfig, entry: on_disk.Entry, dtype: str, ids: dict[str, int | None]
) -> dict[str, Any]:
    meta = entry.record["meta"]
    length = meta.get("context") or (meta["config"].get("data") or {}).get("sequence_length") or 2048
    return {
        "architectures": [form.architecture],
        "model_type": form.name,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "pad_token_id": None,
        "max_position_embeddings": length,
        **ids,
        **form.write(config),
    }


def _fits(checkpoint: Path, plan: list[Group | Absent]) -> None:
    """Raises ValueError unless the plan takes every tensor of the model exactly once."""
    stored = {name.removeprefix(PREFIX) for name in storage.contents(checkpoint) if name.startswith(PREFIX)}
    named = [name for one in plan for name in ([one.ours] if isinstance(one, Absent) else one.ours)]
    assert len(named) == len(set(named)), "a tensor is named twice"
    odd = sorted(stored.symmetric_difference(named))
    if odd:
        what = "holds" if odd[0] in stored else "lacks"
        raise ValueError(f"{checkpoint} {what} {odd[0]}, which does not fit its configuration")


def _theirs(checkpoint: Path, plan: list[Group | Absent], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under their name, in the order of the plan."""
    stored = storage.contents(checkpoint)
    batch: list[Group | Absent] = []
    size = 0
    for one in [*plan, None]:
        if batch and (one is None or size > BATCH_BYTES):
            yield from _arranged(checkpoint, batch, stored, dtype)
            batch, size = [], 0
        if one is not None:
            batch.append(one)
            size += sum(stored[PREFIX + name].bytes for name in ([one.ours] if isinstance(one, Absent) else one.ours))


def _arranged(
    checkpoint: Path, batch: list[Group | Absent], stored: dict[str, storage.Spec], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    names = [PREFIX + name for one in batch for name in ([one.ours] if isinstance(one, Absent) else one.ours)]
    tensors = {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in names}
    storage.read(checkpoint, tensors, subset=True)
    for one in batch:
        if isinstance(one, Absent):
            if one.because and not bool((tensors[PREFIX + one.ours] == one.value).all()):
                raise ValueError(f"model tensor {one.ours} is not {one.value:g} everywhere: {one.because}")
            continue
        arranged = one.out([tensors[PREFIX + name] for name in one.ours])
        assert len(arranged) == len(one.theirs)
        for name, tensor in zip(one.theirs, arranged):
            yield name, tensor.to(torch.float32 if one.wide else dtype)
