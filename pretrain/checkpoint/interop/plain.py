"""What a model computes, without names, repeats and defaults: two configurations are the same model if this is equal.

A format's obstacles come from here: a configuration is written as theirs, read back, and whatever did not survive stands in the
way. So an option that a format's author never thought of is refused, not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.model.decoder import DecoderConfig
from pretrain.model.rotary import rotary_channels

Fields = dict[str, Any]
# Keys of the model section that say how it is put together, or only how weights begin.
_STRUCTURE = {"mixers", "ffns", "layers", "repeat", "block", "init_std"}
# Only training looks at these: losses, and what moves a router's bias.
_TRAINING = {
    "moe": {"bias_rate", "batch_loss", "sequence_loss", "z_loss"},
    "zaya_moe": {"bias_lr", "bias_beta1", "bias_beta2", "bias_weight_decay", "skip_target"},
}


@dataclass(frozen=True)
class PlainLayer:
    """mixer, ffn: their fields with defaults filled in, {} where the layer has none; the names are those of the configuration."""

    mixer_name: str | None
    ffn_name: str | None
    placement: str
    mixer: Fields
    ffn: Fields


@dataclass(frozen=True)
class Plain:
    top: Fields
    layers: tuple[PlainLayer, ...]


def plain(config: DecoderConfig) -> Plain:
    whole = config.model_dump(mode="json")
    block = {f"block.{key}": value for key, value in whole["block"].items() if key not in ("norm", "norm_of")}
    mixers = {name: _fields(fields, config.width) for name, fields in whole["mixers"].items()}
    ffns = {name: _fields(fields, config.width) for name, fields in whole["ffns"].items()}
    layers = [
        PlainLayer(
            layer.mixer,
            layer.ffn,
            config.block.norm_of.get(layer.mixer or "", config.block.norm),
            mixers[layer.mixer] if layer.mixer else {},
            ffns[layer.ffn] if layer.ffn else {},
        )
        for layer in config.pattern()
    ]
    return Plain({key: value for key, value in whole.items() if key not in _STRUCTURE} | block, tuple(layers))


def _fields(fields: Fields, width: int) -> Fields:
    kept = {key: value for key, value in fields.items() if key not in _TRAINING.get(fields["kind"], ())}
    _RESOLVE.get(fields["kind"], lambda found, width: None)(kept, width)
    return kept


def _attention(f: Fields, width: int) -> None:
    f["kv_heads"] = f["kv_heads"] or f["heads"]
    f["head_dim"] = f["head_dim"] or width // f["heads"]
    if f["scale"] is not None and math.isclose(f["scale"], f["head_dim"] ** -0.5):
        f["scale"] = None
    if not f["qk_norm"]:
        f["qk_norm_over"] = f["norm_eps"] = None
    _positions(f)


def _cca(f: Fields, width: int) -> None:
    f["kv_heads"] = f["kv_heads"] or f["heads"]
    _positions(f)


def _positions(f: Fields) -> None:
    # Fractions that rotate the same channels are the same.
    f["rope_fraction"] = rotary_channels(f["head_dim"], f["rope_fraction"]) / f["head_dim"]
    if f["rope_fraction"] == 0:
        f["rope_theta"] = None


def _delta(f: Fields, width: int) -> None:
    f["value_heads"] = f["value_heads"] or f["heads"]
    f["value_dim"] = f["value_dim"] or f["head_dim"]
    if f["kind"] == "kda":
        f["rank"] = f["rank"] or f["head_dim"]
        if not f["safe_gate"]:
            f["lower_bound"] = None


def _latent(f: Fields, width: int) -> None:
    f["value_dim"] = f["value_dim"] or f["head_dim"]
    if f["scale"] is not None and math.isclose(f["scale"], (f["head_dim"] + f["shared_dim"]) ** -0.5):
        f["scale"] = None
    if not f["rope"]:
        f["rope_theta"] = None


def _mamba2(f: Fields, width: int) -> None:
    if f["dt_limits"] is not None and f["dt_limits"][0] == 0 and math.isinf(f["dt_limits"][1]):
        f["dt_limits"] = None


def _moe(f: Fields, width: int) -> None:
    if f["groups"] == f["top_groups"]:  # every group is open
        f["groups"] = f["top_groups"] = 1


_RESOLVE: dict[str, Callable[[Fields, int], None]] = {
    "attention": _attention,
    "cca": _cca,
    "gated_delta_net": _delta,
    "kda": _delta,
    "mla": _latent,
    "mamba2": _mamba2,
    "moe": _moe,
}


def differences(ours: Plain, theirs: Plain, title: str) -> list[str]:
    """A line for each option of `ours` that is another in `theirs`, by its name in the configuration. Equally many layers."""
    found = [
        f"model.{key} = {show(value)}: {title} has {show(theirs.top.get(key))}"
        for key, value in ours.top.items()
        if value != theirs.top.get(key)
    ]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        if a.placement != b.placement:
            found.append(f"model.block.norm = {a.placement} (layers with {a.mixer_name}): {title} has {b.placement}")
        for section, name, mine, other in (
            ("mixers", a.mixer_name, a.mixer, b.mixer),
            ("ffns", a.ffn_name, a.ffn, b.ffn),
        ):
            for key in mine:
                if mine[key] != other.get(key):
                    where = f"model.{section}.{name}.{key} = {show(mine[key])}"
                    found.append(f"{where}: {title} has {show(other.get(key))}")
    return list(dict.fromkeys(found))


def show(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "{...}" if isinstance(value, dict) else str(value)
