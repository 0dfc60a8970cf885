"""What a format is, which ones there are, and what in a model stands in the way of one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from parallel.config import guess
from pretrain.checkpoint.interop import FORMATS
from pretrain.checkpoint.interop.plain import Plain, differences, plain
from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.interop.weights import Absent, Group
from pretrain.model.decoder import DecoderConfig


@dataclass(frozen=True)
class Format:
    """One class of models there.

    name: its model_type in config.json. mixers, ffns: kinds that its layers may have; no ffns: layers of a mixer only.
    write: our model section -> config.json, for a model of those kinds. read: config.json -> our model section; raises ValueError
    for what cannot be expressed here. weights: where every tensor is. limits: lines for what reading back cannot notice.
    note: what a person should know about every exported folder.
    """

    name: str
    title: str
    architecture: str
    mixers: tuple[str, ...]
    ffns: tuple[str, ...]
    write: Callable[[DecoderConfig], dict[str, Any]]
    read: Callable[[Theirs], dict[str, Any]]
    weights: Callable[[DecoderConfig], Iterable[Group | Absent]]
    limits: Callable[[DecoderConfig], list[str]] = lambda config: []
    note: str = ""


def find(name: str) -> Format:
    """Raises ValueError naming the nearest format if there is none of that name."""
    if name not in FORMATS:
        raise ValueError(f"{name!r} is no known format; {guess(name, list(FORMATS))}formats: {', '.join(FORMATS)}")
    module = importlib.import_module(f"pretrain.checkpoint.interop.{name}")
    found: Format = module.FORMAT
    return found


def choose(name: str, config: DecoderConfig) -> Format:
    """The format of that name, or the first that can express the model for "auto".

    Raises ValueError, saying which options stand in the way: all of them for a named format, the first of each for "auto".
    """
    if name != "auto":
        form = find(name)
        found = obstacles(form, config)
        if found:
            raise ValueError(f"{form.name} cannot express this model:" + "".join(f"\n  {line}" for line in found))
        return form
    lines = []
    for candidate in map(find, FORMATS):
        found = obstacles(candidate, config)
        if not found:
            return candidate
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        lines.append(f"\n  {candidate.name}: {found[0]}{more}")
    raise ValueError("no format can express this model:" + "".join(lines))


def obstacles(form: Format, config: DecoderConfig) -> list[str]:
    """A line for each option that the format cannot express; [] if it can express the model."""
    ours = plain(config)
    found = _kinds(form, ours)
    if found:
        return found
    try:
        theirs = plain(model_of(form, Theirs(form.write(config), form.title)))
    except (ValueError, ValidationError) as error:
        return [*form.limits(config), str(error)]
    return [*differences(ours, theirs, form.title), *form.limits(config)]


def _kinds(form: Format, ours: Plain) -> list[str]:
    found = []
    for layer in ours.layers:
        for section, name, fields, kinds in (
            ("mixers", layer.mixer_name, layer.mixer, form.mixers),
            ("ffns", layer.ffn_name, layer.ffn, form.ffns),
        ):
            sort = {"mixers": "mixer", "ffns": "FFN"}[section]
            if name is None and kinds:
                other = layer.ffn_name if section == "mixers" else layer.mixer_name
                found.append(f"model.layers has {other} without a {sort}: {form.title}'s layers have {_or(kinds)}")
            elif name is not None and not kinds:
                found.append(f"model.layers has {layer.mixer_name} + {name}: {form.title}'s layers have no {sort}")
            elif name is not None and fields["kind"] not in kinds:
                found.append(f"model.{section}.{name}.kind = {fields['kind']}: {form.title} has {_or(kinds)}")
    return list(dict.fromkeys(found))


def _or(kinds: tuple[str, ...]) -> str:
    return " or ".join(kinds)


def model_of(form: Format, theirs: Theirs) -> DecoderConfig:
    """The model that a config.json describes. Raises ValueError for what cannot be expressed here."""
    try:
        return DecoderConfig.model_validate(form.read(theirs))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"{theirs.where}: {where}: {fault['msg'].removeprefix('Value error, ')}") from None
