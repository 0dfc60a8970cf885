"""Loads a trained model for use: `from pretrain import load`."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.state import model_tensors
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.storage import read
from pretrain.config import RunConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.exit import NO_CHECKPOINT, Exit
from pretrain.model.decoder import Decoder
from pretrain.train.save import FOLDER


def load(path: str | Path, device: str = "auto") -> tuple[Decoder, Tokenizer]:
    """(model, tokenizer) of a run folder (its newest good checkpoint) or of one checkpoint folder.

    The model is in evaluation mode, in fp32, on `device` ("cpu", "cuda", or "auto": a GPU if there is one).
    Raises Exit (with an exit code) when there is nothing to load.
    """
    checkpoints, checkpoint = _find(Path(path))
    config = RunConfig.model_validate(checkpoints.meta(checkpoint)["config"])
    model = Decoder(config.model)
    read(checkpoint, model_tensors(model))
    where = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    return model.eval().to(where), Tokenizer(_tokenizer(checkpoint.parent.parent, config))


def _find(path: Path) -> tuple[Checkpoints, Path]:
    if not path.exists():
        raise Exit(f"{path}: no such folder; give a run folder such as runs/quickstart, or one of its checkpoints")
    if (path / "meta.json").exists():
        return Checkpoints(path.parent), path
    folder = path / FOLDER if (path / FOLDER).exists() else path
    checkpoints = Checkpoints(folder)
    newest = checkpoints.newest()
    if newest is None:
        raise Exit(f"{path}: no checkpoint here yet; train first, or give another folder", NO_CHECKPOINT)
    return checkpoints, newest


def _tokenizer(run: Path, config: RunConfig) -> Path:
    """The run keeps its own copy of the tokenizer, so that a model can be used where the data is not."""
    own = run / "tokenizer.model"
    if own.exists():
        return own
    return config.data.tokenizer or config.data.path / "tokenizer.model"
