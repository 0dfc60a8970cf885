"""Model files, `configs/models/*.yaml`: an architecture and the number of parameters that it must have.

parameters: 1_234           # checked whenever the file is described, and by the tests
active_parameters: 567
model: {width: ..., ...}    # as in a run file; there, `model: configs/models/X.yaml` refers to it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field

from parallel.config import Strict
from pretrain.model.decoder import Decoder, DecoderConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"


class ModelFile(Strict):
    model: DecoderConfig
    parameters: int | None = Field(None, ge=1)
    """Parameters that the model has in all."""
    active_parameters: int | None = Field(None, ge=1)
    """Parameters that one token uses."""


def model_section(value: Any, beside: Path) -> Any:
    """What the `model` of a run file stands for: itself, or the section of the model file that it names.

    The name is a path from the working folder, from the run file's folder or from the project's. Raises ValueError if there is
    no such file or if it is not a model file.
    """
    if not isinstance(value, str):
        return value
    places = [Path(value), beside.parent / value, FOLDER.parents[1] / value]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.name for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"model = {value!r}: no such file; configs/models has {known}")
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise ValueError(f"{path}: not a model file; it needs a section `model:`")
    return raw["model"]


def empty(config: DecoderConfig) -> Decoder:
    """The model without memory for its weights: for counting. Raises ValueError for sizes that do not fit."""
    with torch.device("meta"):
        return Decoder(config)


def count(model: Decoder) -> tuple[int, int]:
    """(parameters, parameters that one token uses)."""
    return sum(parameter.numel() for parameter in model.parameters()), model.active_parameters()
