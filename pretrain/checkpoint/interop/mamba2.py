"""Mamba-2: layers of one mixer and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.interop.weights import Group, same, taps
from pretrain.model.decoder import DecoderConfig
from pretrain.model.mixers.mamba2 import Mamba2Config


def write(config: DecoderConfig) -> dict[str, Any]:
    mixer = parts.first(config, Mamba2Config)
    assert mixer is not None
    limits = {} if mixer.dt_limits is None else {"time_step_limit": list(mixer.dt_limits)}
    return {
        **parts.write_top(config),
        "expand": int(mixer.expand) if mixer.expand.is_integer() else mixer.expand,
        "head_dim": mixer.head_dim,
        "num_heads": round(mixer.expand * config.width) // mixer.head_dim,
        "state_size": mixer.state_dim,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_width,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
        "chunk_size": 256,
        **limits,
    }


def read(theirs: Theirs) -> dict[str, Any]:
    top = parts.read_top(theirs, eps="layer_norm_epsilon", eps_default=1e-5)
    low, high = map(_number, theirs.get("time_step_limit", default=[0.0, math.inf]))
    mixer = {
        "kind": "mamba2",
        "expand": theirs.get("expand", default=2),
        "head_dim": theirs.get("head_dim", default=64),
        "state_dim": theirs.get("state_size", default=128),
        "groups": theirs.get("n_groups", default=8),
        "conv_width": theirs.get("conv_kernel", default=4),
        "conv_bias": theirs.get("use_conv_bias", default=True),
        "bias": theirs.get("use_bias", default=False),
        "dt_limits": None if low == 0 and math.isinf(high) else [low, high],
        "norm_eps": top["norm_eps"],
    }
    inner, heads = mixer["expand"] * top["width"], theirs.get("num_heads", default=128)
    if heads * mixer["head_dim"] != inner:
        raise ValueError(
            f"{theirs.where}: num_heads = {heads} of {mixer['head_dim']} channels are not the {inner} inner ones"
        )
    # How many tokens are computed at a time, where the stream is rounded, and how weights begin.
    for key in ("chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_rank", "time_step_min"):
        theirs.get(key)
    theirs.get("time_step_max"), theirs.get("time_step_floor")
    return {**top, "mixers": {"mamba": mixer}, **parts.pattern(["mamba"] * theirs.need("num_hidden_layers"))}


def _number(value: Any) -> float:
    """transformers writes {"__float__": "Infinity"} for what JSON has no number for."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def weights(config: DecoderConfig) -> Iterator[Group]:
    yield from parts.ends(config, "backbone", "embeddings", "norm_f")
    for index, mixer, _ in parts.sublayers(config):
        ours, theirs = f"blocks.{index}.mixer", f"backbone.layers.{index}.mixer"
        yield same(f"blocks.{index}.mixer_norm.weight", f"backbone.layers.{index}.norm.weight")
        for mine, other in (("in_proj", "in_proj"), ("out", "out_proj")):
            yield same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight")
            if mixer.bias:
                yield same(f"{ours}.{mine}.bias", f"{theirs}.{other}.bias")
        yield taps(f"{ours}.conv", f"{theirs}.conv1d.weight")
        if mixer.conv_bias:
            yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
        for name in ("A_log", "dt_bias", "D"):
            yield same(f"{ours}.{name}", f"{theirs}.{name}", wide=True)
        yield same(f"{ours}.norm", f"{theirs}.norm.weight")


def limits(config: DecoderConfig) -> list[str]:
    mixer = parts.first(config, Mamba2Config)
    if mixer is None or mixer.expand.is_integer():
        return []
    return [f"model.mixers.*.expand = {mixer.expand}: Mamba-2's configuration has whole numbers"]


FORMAT = Format("mamba2", "Mamba-2", "Mamba2ForCausalLM", ("mamba2",), (), write, read, weights, limits)
