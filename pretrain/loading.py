"""Loads a trained model for use: `from pretrain import load`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain.checkpoint import folder as on_disk
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.interop.source import model_section
from pretrain.config import RunConfig
from pretrain.data.errors import DataError
from pretrain.data.tokenizer import Tokenizer, find
from pretrain.exit import NO_CHECKPOINT, USAGE, Exit
from pretrain.model.decoder import Decoder
from pretrain.train.save import FOLDER


class Opened(NamedTuple):
    """A trained model and where it comes from. checkpoint: the folder that was read; step: of training."""

    model: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    step: int


def load(
    path: str | Path,
    device: str = "auto",
    max_memory: Mapping[int | str, int] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[Decoder, Tokenizer]:
    """(model, tokenizer) of a run folder (its newest good checkpoint) or of one checkpoint folder.

    The model is in evaluation mode, in fp32, on `device` ("cpu", "cuda", or "auto": a GPU if there is one).

    For a model too big for the device, give max_memory and/or offload_folder: then the layers are spread over GPUs, CPU memory
    and disk, and those that do not fit on a GPU are brought to it one at a time. max_memory: bytes of weights by GPU number and
    "cpu", or "each" for every GPU (the CPU, without one); what is free when left out. Such a model can compute, not be trained.

    Raises Exit (with an exit code) when there is nothing to load, or no room.
    """
    opened = open_checkpoint(path, device, max_memory, offload_folder)
    return opened.model, opened.tokenizer


def open_checkpoint(
    path: str | Path,
    device: str = "auto",
    max_memory: Mapping[int | str, int] | None = None,
    offload_folder: str | Path | None = None,
) -> Opened:
    """As `load`, with the run's configuration as well."""
    from pretrain import placement  # accelerate is imported only where a model is loaded

    main = _main_device(device)
    candidates = _find(Path(path))
    for number, checkpoint in enumerate(candidates):
        config = _config(checkpoint)
        model = placement.empty_decoder(config.model)
        try:
            if max_memory is None and offload_folder is None:
                placement.fill(model, checkpoint.path, main)
            else:
                where = placement.place(model, main, max_memory)
                placement.fill_placed(model, checkpoint.path, where, offload_folder)
                print(f"layers of {checkpoint.path.name}: {where}", file=sys.stderr)
            break
        except CheckpointError as error:
            if number == len(candidates) - 1:
                raise
            print(f"skipping checkpoint {checkpoint.path}: {error}", file=sys.stderr)
    tokenizer = Tokenizer(_tokenizer(checkpoint.path.parent.parent, config))
    _check(tokenizer, checkpoint)
    return Opened(model.eval(), tokenizer, config, checkpoint.path, checkpoint.step)


def _main_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise Exit("device cuda, but torch sees no CUDA or ROCm device; use cpu or auto", USAGE)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


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


def _config(checkpoint: on_disk.Entry) -> RunConfig:
    """The run's configuration. An imported model has a model section only, and no run: the rest is filled in for form's sake."""
    meta = checkpoint.record["meta"]
    if set(meta["config"]) != {"model"}:
        return RunConfig.model_validate({**meta["config"], "model": model_section(meta)})
    run = checkpoint.path.parent.parent
    data = {"path": run, "sequence_length": min(meta.get("context", 2048), 2048)}
    return RunConfig.model_validate({**meta["config"], "run": run, "data": data, "train": {"steps": 1, "batch": 1}})


def _tokenizer(run: Path, config: RunConfig) -> Path:
    """The run keeps its own copy of the tokenizer, so that a model can be used where the data is not."""
    if any((run / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return find(run)
    return config.data.tokenizer or config.data.path / "tokenizer.model"


def _check(tokenizer: Tokenizer, checkpoint: on_disk.Entry) -> None:
    """Raises DataError if the model was trained with another tokenizer, or with this one before it was damaged."""
    trained = checkpoint.record["meta"].get("tokenizer")
    found = None if trained is None else tokenizer.fingerprint
    if found != trained:
        raise DataError(
            f"{tokenizer.path} (xxh3_128 {found}) is not the tokenizer that {checkpoint.path} was trained with ({trained}), so "
            "the model's ids mean other text: copy the tokenizer of the data that it was trained on to "
            f"{checkpoint.path.parent.parent / 'tokenizer.model'}"
        )
