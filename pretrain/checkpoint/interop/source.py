"""Which checkpoint is meant by a path, and which model it holds."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint.errors import CheckpointError
from pretrain.model.decoder import DecoderConfig


def newest(source: Path) -> on_disk.Entry:
    """The checkpoint at `source`, or the newest complete one of that run. Raises ValueError if there is none."""
    one = on_disk.inspect(source.resolve())
    if one is not None:
        if one.fault:
            raise CheckpointError(f"{source}: {one.fault}")
        return one
    if not source.is_dir():
        raise ValueError(
            f"{source}: no such folder; give a run folder such as runs/quickstart, or one of its checkpoints"
        )
    found = on_disk.loadable(on_disk.resolve(source).resolve(), lambda line: None)
    if not found:
        raise ValueError(f"{source}: no checkpoints yet")
    return found[0]


def model_config(entry: on_disk.Entry) -> DecoderConfig:
    try:
        section = entry.record["meta"]["config"]["model"]
    except (KeyError, TypeError):
        raise ValueError(f"{entry.path}: its {on_disk.META} has no model configuration") from None
    return DecoderConfig.model_validate(section)
