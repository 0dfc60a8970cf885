"""Which layouts are compared: their names, and what a model and a number of ranks allow. No processes."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from parallel.grid import MeshConfig, layouts
from pretrain.config import ConfigError, RunConfig, explain
from pretrain.train import layout

ATTENDING = {"attention", "cca", "mla", "smha"}  # mixers with keys and values that a ring can pass on


def name(mesh: MeshConfig, world: int) -> str:
    """`dp=2,tp=2`: as --layouts takes it."""
    grid = mesh.grid(world)
    sizes = {axis: grid.size(axis) for axis in ("pp", "dp", "replicate", "cp", "tp", "ep")}
    parts = [f"{axis}={size}" for axis, size in sizes.items() if size > 1] or ["dp=1"]
    given = mesh.model_dump(exclude_defaults=True, exclude={*sizes})
    return ",".join([*parts, *(f"{key}={str(value).lower()}" for key, value in given.items())])


def parse(text: str, config: RunConfig, world: int) -> MeshConfig:
    """The layout that a text names. Raises ConfigError, with the valid ones, for one that does not fit the model or the ranks."""
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    where = f"--layouts {text}"
    try:
        mesh = MeshConfig.model_validate(pairs)
        layout.check(config.model_copy(update={"mesh": mesh}), world)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error, pairs))) from None
    except ConfigError as error:
        known = " ".join(name(mesh, world) for mesh in legal(config, world))
        raise ConfigError(f"{where}: {error}\nlayouts of this model on {world} rank(s): {known}") from None
    return mesh


def legal(config: RunConfig, world: int) -> list[MeshConfig]:
    """Every layout that the model allows on so many ranks, fewest axes first, in each of its ways to pass keys and batches on."""
    found = []
    for plain in layouts(world):
        if _fits(plain, config, world):
            found += [plain, *(variant for variant in _variants(plain, config) if _fits(variant, config, world))]
    return found


def _fits(mesh: MeshConfig, config: RunConfig, world: int) -> bool:
    try:
        layout.check(config.model_copy(update={"mesh": mesh}), world)
    except ConfigError:
        return False
    return True


def _variants(mesh: MeshConfig, config: RunConfig) -> Iterator[MeshConfig]:
    attends = any(getattr(mixer, "kind", "") in ATTENDING for mixer in config.model.mixers.values())
    ring = [{"context": "ring"}] if mesh.cp > 1 and attends and config.engine.kind == "torch" else []
    schedules = [{"pp_schedule": "interleaved"}, {"pp_schedule": "zbv"}] if mesh.pp > 1 else []
    for change in [*ring, *schedules]:
        yield mesh.model_copy(update=change)
