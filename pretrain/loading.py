"""Loads a trained model for use: `from pretrain import load`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from parallel.state import model_tensors
from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.storage import read
from pretrain.config import RunConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.exit import NO_CHECKPOINT, USAGE, Exit
from pretrain.model.decoder import Decoder
from pretrain.train.save import FOLDER


def load(path: str | Path, device: str = "auto") -> tuple[Decoder, Tokenizer]:
    """(model, tokenizer) of a run folder (its newest good checkpoint) or of one checkpoint folder.

    The model is in evaluation mode, in fp32, on `device` ("cpu", "cuda", or "auto": a GPU if there is one).
    Raises Exit (with an exit code) when there is nothing to load.
    """
    candidates = _find(Path(path))
    for number, checkpoint in enumerate(candidates):
        config = RunConfig.model_validate(checkpoint.record["meta"]["config"])
        model = Decoder(config.model)
        try:
            read(checkpoint.path, model_tensors(model))
            break
        except CheckpointError as error:
            if number == len(candidates) - 1:
                raise
            print(f"skipping checkpoint {checkpoint.path}: {error}", file=sys.stderr)
    if device == "cuda" and not torch.cuda.is_available():
        raise Exit("device cuda, but torch sees no CUDA or ROCm device; use cpu or auto", USAGE)
    where = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    return model.eval().to(where), Tokenizer(_tokenizer(checkpoint.path.parent.parent, config))


def _find(path: Path) -> list[on_disk.Entry]:
    """The checkpoints to try, newest first; a single one when `path` is itself a checkpoint."""
    if not path.exists():
        raise Exit(f"{path}: no such folder; give a run folder such as runs/quickstart, or one of its checkpoints")
    one = on_disk.inspect(path.resolve())
    if one is not None:
        if one.fault:
            raise CheckpointError(f"{path}: {one.fault}")
        return [one]
    folder = path / FOLDER if (path / FOLDER).exists() else path
    found = on_disk.loadable(folder, lambda line: print(line, file=sys.stderr))
    if not found:
        raise Exit(f"{path}: no checkpoint here yet; train first, or give another folder", NO_CHECKPOINT)
    return found


def _tokenizer(run: Path, config: RunConfig) -> Path:
    """The run keeps its own copy of the tokenizer, so that a model can be used where the data is not."""
    own = run / "tokenizer.model"
    if own.exists():
        return own
    return config.data.tokenizer or config.data.path / "tokenizer.model"
