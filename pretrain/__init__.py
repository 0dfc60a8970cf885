"""What is trained and how: configuration, data, model, optimizer, checkpoint, training, evaluation."""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `python -m pretrain.data --help` does not wait for torch.
    if name == "load":
        from pretrain.loading import load

        return load
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
