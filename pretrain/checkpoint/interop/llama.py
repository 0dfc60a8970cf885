"""Llama: attention without q/k norms and SwiGLU, norms before both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs, rope_of
from pretrain.checkpoint.interop.weights import Group
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.mixers.attention import AttentionConfig


def write(config: DecoderConfig) -> dict[str, Any]:
    attention, ffn = parts.first(config, AttentionConfig), parts.first(config, SwiGLUConfig)
    assert attention is not None and ffn is not None
    return {
        **parts.write_top(config),
        **parts.write_attention(config, attention),
        "intermediate_size": ffn.hidden,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_of(1.0, attention.rope_theta),
    }


def read(theirs: Theirs) -> dict[str, Any]:
    theirs.only("mlp_bias", False)
    attention = {**parts.read_attention(theirs), **theirs.rope(), "qk_norm": False}
    return {
        **parts.read_top(theirs),
        "mixers": {"attention": attention},
        "ffns": {"swiglu": {"kind": "swiglu", "hidden": theirs.need("intermediate_size")}},
        **parts.pattern(["attention + swiglu"] * theirs.need("num_hidden_layers")),
    }


def weights(config: DecoderConfig) -> Iterator[Group]:
    yield from parts.ends(config)
    for index, mixer, ffn in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield from parts.pre_norms(ours, theirs)
        yield from parts.attention(config, mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        yield from parts.swiglu(f"{ours}.ffn", f"{theirs}.mlp", ffn.hidden)


def limits(config: DecoderConfig) -> list[str]:
    attention = parts.first(config, AttentionConfig)
    if attention is None or config.width % attention.heads == 0:
        return []
    return [
        f"model.mixers.*.heads = {attention.heads}: Llama's configuration insists on a divisor of width = {config.width}"
    ]


FORMAT = Format("llama", "Llama", "LlamaForCausalLM", ("attention",), ("swiglu",), write, read, weights, limits)
