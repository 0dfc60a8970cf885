"""Which checkpoint is meant by a path, and which model it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        section = model_section(entry.record["meta"])
    except (KeyError, TypeError):
        raise ValueError(f"{entry.path}: its {on_disk.META} has no model configuration") from None
    return DecoderConfig.model_validate(section)


def model_section(meta: dict[str, Any]) -> Any:
    """The model's configuration in a checkpoint, with the rope base that it was trained with last (see data.stages)."""
    section, theta = meta["config"]["model"], meta.get("rope_theta")
    return section if theta is None else _replaced(section, theta)


def _replaced(section: Any, theta: float) -> Any:
    if isinstance(section, dict):
        return {key: theta if key == "rope_theta" else _replaced(value, theta) for key, value in section.items()}
    return [_replaced(value, theta) for value in section] if isinstance(section, list) else section
