"""What the command is asked: a run or model file, a hardware file, a number of GPUs; and what is assumed besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parallel.fabric.topology import Fabric, Network, Switch
from pretrain import config as configuration
from pretrain.config import ConfigError, RunConfig
from pretrain.estimate import hardware as chips
from pretrain.estimate.book import Book
from pretrain.estimate.hardware import Hardware
from pretrain.estimate.model import ModelCosts

MOST_GPUS = 100_000
LENGTH = 4096  # of a sequence, for a model file
SEQUENCES_A_GPU = 4  # a step, for a model file: 4096 sequences on 1024 GPUs, as ZAYA1 was trained
TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022 (arXiv 2203.15556), for a model file

# Where a hardware file has no `fabric:` section: what nodes of eight GPUs on a switch with a card of 400 Gbit/s each have.
USUAL_FABRIC = Fabric(
    node=Switch(gpus=8, gpu_gbs=450, efficiency=0.8), network=Network(nics=8, nic_gbits=400, efficiency=0.8)
)


@dataclass(frozen=True)
class Question:
    """path: of the configuration. tokens: of the whole run.

    overlap: share of the computation that messages may hide behind. headroom: share of the memory that is kept free.
    efficiency: of matrix products, instead of what is measured or assumed. book: of traces of layers.
    """

    path: Path
    config: RunConfig
    model: ModelCosts
    hardware: Hardware
    hardware_path: Path
    fabric: Fabric
    gpus: int
    tokens: float
    overlap: float
    headroom: float
    efficiency: float | None
    notes: tuple[str, ...]
    book: Book | None = None

    @property
    def node(self) -> int:
        """GPUs of a node."""
        return self.fabric.node.gpus

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.node)


def with_(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with fields of some sections changed, not validated again: values come from valid ones."""
    changed = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=changed)


def ask(
    path: Path,
    hardware: Path,
    gpus: int,
    overrides: Sequence[str] = (),
    *,
    tokens: float | None = None,
    overlap: float | None = None,
    headroom: float = 0.05,
    efficiency: float | None = None,
    remember: bool = False,
) -> Question:
    """remember: use traces of layers from earlier commands (pretrain/estimate/book.py). Close the book afterwards.

    Raises ConfigError or Exit, saying how to mend it, for files, keys and sizes that are none."""
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus {gpus}: choose from 1 to {MOST_GPUS}")
    chip = chips.read(hardware)
    notes: list[str] = []
    fabric: Fabric | None = getattr(chip, "fabric", None)
    if fabric is None:
        fabric = USUAL_FABRIC
        notes.append(
            f"{hardware} has no fabric section: nodes of 8 GPUs on a switch (450 GB/s each) and a 400 Gbit/s card for each GPU, "
            "80 % of which is reached, are assumed"
        )
    raw = configuration.read_yaml(path)
    from_run = "train" in raw or "data" in raw or "run" in raw
    batch_given = from_run or any(override.startswith("train.batch=") for override in overrides)
    if from_run:
        config = _with_vocabulary(configuration.load(path, overrides), path)
    else:
        config, assumed = _of_model(path, raw, gpus, overrides, batch_given)
        notes += assumed
    book = Book.of(config.model) if remember else None
    model = ModelCosts.of(config, book)
    if tokens is None and from_run:
        tokens = float(config.train.batch * config.data.sequence_length * config.train.steps)
    elif tokens is None:
        tokens = float(TOKENS_A_PARAMETER * model.parameters)
        notes.append(f"no number of tokens is given: {TOKENS_A_PARAMETER} a parameter are assumed (say --tokens 12T)")
    if overlap is None:
        overlap = 0.0 if config.train.device == "cpu" or "cpu" in chip.name.lower() else 1.0
    return Question(
        path, config, model, chip, hardware, fabric, gpus, tokens, overlap, headroom, efficiency,
        tuple(notes), book,
    )  # fmt: skip


def _of_model(
    path: Path, raw: dict[str, Any], gpus: int, overrides: Sequence[str], batch_given: bool
) -> tuple[RunConfig, list[str]]:
    """(a run of a model file, what was assumed for it)."""
    if "model" not in raw:
        raise ConfigError(f"{path}: has no section `model:`; give a model file or a run file")
    unknown = sorted(set(raw) - {"model", "parameters", "active_parameters"})
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: neither a key of a model file nor is this a run file")

    def resolved(batch: int) -> RunConfig:
        run = {
            "run": "runs/plan",
            "model": yaml.safe_load(yaml.safe_dump(raw["model"])),  # overrides change it
            "data": {"path": "data", "sequence_length": LENGTH},
            "train": {"steps": 1, "batch": batch},
        }
        return _with_vocabulary(configuration.resolve(run, path, overrides), path)

    config = resolved(SEQUENCES_A_GPU * gpus)
    notes = [f"sequences of {LENGTH} tokens"] if config.data.sequence_length == LENGTH else []
    if not batch_given:
        own = config.train.micro_batch
        config = resolved(gpus * (SEQUENCES_A_GPU if SEQUENCES_A_GPU % own == 0 else own))
        notes.append(f"{config.train.batch // gpus} sequences a GPU and step")
    return config, [f"{path} is a model file: {' and '.join(notes)} are assumed"] if notes else []


def _with_vocabulary(config: RunConfig, path: Path) -> RunConfig:
    if config.model.vocabulary is not None:
        return config
    from pretrain.data.opening import vocabulary_size  # which imports much, and only to read one number
    from pretrain.train.build import with_vocabulary

    try:
        size = vocabulary_size(config.data)
    except Exception as error:
        raise ConfigError(
            f"{path}: model.vocabulary is left to the data's tokenizer: {error} (or say model.vocabulary=N here)"
        ) from None
    return with_vocabulary(config, size)
