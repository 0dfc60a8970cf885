"""The typed configuration of a run: YAML files, dotted overrides, and errors in one line.

Every section is defined beside what it configures; this file only puts them together and reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from parallel.config import Strict, guess
from parallel.engines import EngineConfig, TorchConfig
from parallel.mesh import MeshConfig
from parallel.recompute import Recompute
from pretrain.checkpoint.near.config import NearConfig
from pretrain.data.config import DataConfig
from pretrain.host import CpuConfig
from pretrain.model.decoder import DecoderConfig
from pretrain.model.files import model_section
from pretrain.optim.adamw import AdamWConfig
from pretrain.optim.choice import OptimizerConfig
from pretrain.optim.schedules import CosineConfig, ScheduleConfig
from pretrain.profiling.config import ProfileConfig
from pretrain.train.faults.config import FaultsConfig
from pretrain.watch.config import WatchdogConfig


class TrainConfig(Strict):
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    batch: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int = Field(1, ge=1)
    """Sequences that one rank computes at a time; gradients accumulate over batch / (ranks * micro_batch) of them."""
    clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; null for no clipping."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the matrix products. Parameters and optimizer state are fp32 either way."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recompute: Recompute = "none"
    """Activation checkpointing: full keeps only each block's input, selective also the results of matrix products."""
    memory_budget: float | None = Field(None, gt=0)
    """GiB that a step may take on a rank by the estimate of --dry-run. In place of `recompute`: of each layer that much is
    computed again that the step fits, cheapest byte first; the choice is printed. null for none."""
    compile: bool = False
    """torch.compile for every block; blocks that are alike share their programs. The first step is slow; worth it on GPUs."""
    compile_cache: Path | None = None
    """Where compiled programs are kept for later runs; braid/compiled in the user's cache ($XDG_CACHE_HOME or ~/.cache) when left
    out. A folder of the run's own, such as runs/x/compiled, goes where the run goes."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that a rank waits for the others in one operation; then the job ends instead of hanging."""
    seed: int = Field(0, ge=0)
    """Seed of the initial weights; data.seed fixes the order of the data."""
    initial: Path | None = None
    """Start from these weights while this run has no checkpoint of its own: a run, a checkpoint, or an imported folder."""
    bad_steps: int = Field(10, ge=1)
    """Steps in a row that were skipped (see faults), after which the run ends with exit code 79."""


class CheckpointConfig(Strict):
    every: int = Field(1000, ge=1)
    """Steps between saves; the last step is always saved."""
    background: bool = True
    """Write beside training, from a copy of the state in host memory; otherwise every save stops all ranks until it is done."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int | None = Field(None, ge=1)
    """Also keep every checkpoint whose step is a multiple of this."""
    strict: bool = False
    """When the newest checkpoint is damaged, end with exit code 78 instead of going back to the one before it."""
    allow_changes: list[str] = Field(default_factory=list)
    """Dotted keys that may differ from the checkpoint's at resume although they change the data order."""
    near: NearConfig | None = None
    """Saves in the memory of the hosts, between checkpoints; null for none. `near: {}` for the defaults."""


class ValidationConfig(Strict):
    every: int | None = Field(500, ge=1)
    """Steps between validations; null for one at the end only."""
    sequences: int | None = Field(None, ge=1)
    """Validation sequences to score at intervals; all of them when left out, and always at the end."""


class LogConfig(Strict):
    every: int = Field(10, ge=1)
    """Steps between lines when the output is not a terminal; metrics.jsonl has every step."""
    tensorboard: bool = True


class RunConfig(Strict):
    """A run. `run` is its folder: config, checkpoints, metrics and pictures live there."""

    run: Path
    model: DecoderConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    mesh: MeshConfig = MeshConfig()
    engine: EngineConfig = TorchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    cpu: CpuConfig = CpuConfig()
    profile: ProfileConfig | None = None
    """Where the time and the memory of some steps go; null for none. `profile: {}` for steps 10 to 12."""
    hardware: Path | None = None
    """A file of configs/hardware/ with the chip's nominal speed, for MFU; found by the device's name when left out."""

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, data: Any) -> Any:
        return with_default_kinds(data)


def with_default_kinds(data: Any) -> Any:
    """Lets `engine.reshard_after_forward=false` or `schedule.warmup=10` go without the kind that is the default anyway."""
    if isinstance(data, dict):
        for section, kind in (("engine", "torch"), ("schedule", "cosine"), ("optimizer", "adamw")):
            if isinstance(data.get(section), dict):
                data = {**data, section: {"kind": kind, **data[section]}}
    return data


class ConfigError(ValueError):
    """What is wrong with a configuration: one line for each fault."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `key.sub=value` overrides.

    Raises ConfigError, one line a fault: the field, its value, what is allowed, and the nearest valid key.
    """
    return resolve(read_yaml(path), path, overrides)


def resolve(raw: dict[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, for what has been read already (and is changed here). path: where it comes from, for messages."""
    # A model (its file or all of it) may be given in the run file or on the command line; other overrides then change it.
    named = [override for override in overrides if override.startswith("model=")]
    try:
        raw["model"] = model_section(_value(named[-1]) if named else raw.get("model"), Path(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if raw["model"] is None:
        del raw["model"]
    for override in overrides:
        if override not in named:
            _apply(raw, override)
    raw = with_default_kinds(raw)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, raw))) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError when the file is missing, unreadable or something else."""
    try:
        raw = yaml.load(Path(path).read_text(), Loader=_Loader)
    except FileNotFoundError:
        near = sorted(str(file) for file in Path("configs/runs").glob("*.yaml"))
        raise ConfigError(f"{path}: no such file" + (f"; there is {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `model:`, found {type(raw).__name__}")
    return raw


def dump(config: Strict) -> str:
    """The resolved configuration as YAML: what --print-config shows and what a run folder keeps."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def explain(error: ValidationError, raw: Any) -> list[str]:
    """One line for each fault: `model.width = 'abc': input should be a valid integer`."""
    return [_line(fault, _without_tags(fault["loc"], raw)) for fault in error.errors()]


def _line(fault: Any, location: list[str]) -> str:
    where, message, value = ".".join(location), fault["msg"].removeprefix("Value error, "), fault["input"]
    if fault["type"] == "unknown_key":
        return f"{'.'.join([*location, fault['ctx']['key']])}: {message}"
    if fault["type"] == "union_tag_invalid":
        kinds = re.findall(r"'(.*?)'", fault["ctx"]["expected_tags"])
        kind = fault["ctx"]["tag"]
        return f"{where}.kind = {kind!r}: no such kind; {guess(kind, kinds)}valid kinds: {', '.join(kinds)}"
    if fault["type"] == "union_tag_not_found":
        return f"{where}: needs `kind`, which says what it is"
    if fault["type"] == "missing":
        return f"{where}: required, and not there"
    if fault["type"] in ("model_type", "dict_type"):
        message = "should be a section with keys of its own"
    if fault["type"] == "path_type":
        message = "should be a path"
    shown = f" = {value!r}" if isinstance(value, str | int | float | bool | type(None)) else ""
    return f"{where or 'config'}{shown}: {message[0].lower() + message[1:]}"


def _without_tags(location: tuple[int | str, ...], raw: Any) -> list[str]:
    """pydantic puts the chosen kind of a union into the path; a reader of the YAML file never wrote it there."""
    path: list[str] = []
    for part in location:
        if isinstance(raw, dict) and part not in raw and raw.get("kind") == part:
            continue
        path.append(str(part))
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
    return path


def _value(override: str) -> Any:
    text = override.partition("=")[2]
    try:
        return yaml.load(text, Loader=_Loader) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, _ = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} cannot be read; write key.sub=value, for example train.steps=100")
    value = _value(override)
    target: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(target, list):
            target = target[_index(target, part, override)]
        elif target.get(part) is None:
            target[part] = target = {}
        else:
            target = target[part]
        if not isinstance(target, dict | list):
            raise ConfigError(f"override {override!r}: {where} is the value {target!r}, not a section with keys")
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    else:
        target[last] = value


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(f"override {override!r}: {part!r} is not a position in a list of {len(target)}; count from 0")
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)
