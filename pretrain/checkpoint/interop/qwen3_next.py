"""Qwen3-Next: Gated DeltaNet and gated attention, zero-centred norms, softmax-routed experts with a gated shared one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.qwen3_moe import read_experts, write_experts
from pretrain.checkpoint.interop.theirs import Theirs, rope_of
from pretrain.checkpoint.interop.weights import Absent, Arrange, Group, same, taps
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.moe import MoEConfig
from pretrain.model.mixers.attention import AttentionConfig
from pretrain.model.mixers.gated_delta_net import GatedDeltaNetConfig

TYPES = ("linear_attention", "full_attention")
NO_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1}  # the class wants numbers even so


def write(config: DecoderConfig) -> dict[str, Any]:
    attention, linear = parts.first(config, AttentionConfig), parts.first(config, GatedDeltaNetConfig)
    moe = parts.first(config, MoEConfig)
    found = {**parts.write_top(config), **write_experts(config), "rms_norm_eps": config.norm_eps}
    found["layer_types"] = parts.layer_types(config, GatedDeltaNetConfig)
    if attention is not None:
        found |= parts.write_attention(config, attention)
        found["rope_parameters"] = {
            "partial_rotary_factor": 1.0,
            **rope_of(attention.rope_fraction, attention.rope_theta),
        }
    else:
        found |= {**NO_ATTENTION, "head_dim": config.width}
    if linear is not None:
        found |= parts.write_delta_net(linear)
    return found | ({} if moe is None else {"shared_expert_intermediate_size": moe.shared_hidden})


def read(theirs: Theirs) -> dict[str, Any]:
    top, count = parts.read_top(theirs), theirs.need("num_hidden_layers")
    interval = theirs.get("full_attention_interval", default=4)
    default = [TYPES[(index + 1) % interval == 0] for index in range(count)]
    types = theirs.get("layer_types", default=default)
    parts.check_types(theirs, types, TYPES)
    mixers: dict[str, Any] = {}
    attention = {
        **parts.read_attention(theirs),
        **theirs.rope(fraction=0.25),
        "qk_norm": True,
        "zero_centered_norm": True,
        "norm_eps": top["norm_eps"],
        "output_gate": True,
    }
    linear = {
        "kind": "gated_delta_net",
        "heads": theirs.get("linear_num_key_heads", default=16),
        "value_heads": theirs.get("linear_num_value_heads", default=32),
        "head_dim": theirs.get("linear_key_head_dim", default=128),
        "value_dim": theirs.get("linear_value_head_dim", default=128),
        "conv_width": theirs.get("linear_conv_kernel_dim", default=4),
        "norm_eps": top["norm_eps"],
    }
    if TYPES[0] in types:
        mixers["gdn"] = linear
    if TYPES[1] in types:
        mixers["attention"] = attention
    ffns, names = read_experts(theirs, normalize=True)
    shared = theirs.get("shared_expert_intermediate_size", default=512)
    if "moe" in ffns:
        ffns["moe"] |= {"shared_hidden": shared, "shared_gate": True}
    of_type = dict(zip(TYPES, ("gdn", "attention")))
    return {
        **top,
        "mixers": mixers,
        "ffns": ffns,
        "block": {"zero_centered_norms": True},
        **parts.pattern([f"{of_type[kind]} + {name}" for kind, name in zip(types, names)]),
    }


def weights(config: DecoderConfig) -> Iterator[Group | Absent]:
    yield from parts.ends(config)
    for index, mixer, ffn in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield from parts.pre_norms(ours, theirs)
        if isinstance(mixer, GatedDeltaNetConfig):
            yield from delta_net(mixer, f"{ours}.mixer", f"{theirs}.linear_attn")
        else:
            yield from gated_attention(config, mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        yield from parts.qwen_ffn(ffn, f"{ours}.ffn", f"{theirs}.mlp")
        if isinstance(ffn, MoEConfig):
            yield from parts.swiglu(f"{ours}.ffn.shared", f"{theirs}.mlp.shared_expert", ffn.shared_hidden)
            yield same(f"{ours}.ffn.shared_gate.weight", f"{theirs}.mlp.shared_expert_gate.weight")


def delta_net(mixer: GatedDeltaNetConfig, ours: str, theirs: str) -> Iterator[Group]:
    """Rows there are grouped by key head: [q, k, v of its value heads, gate of its value heads] and [beta, decay]."""
    sizes = parts.heads_of(mixer)
    each = sizes.value_heads // sizes.heads
    qkv = parts.delta_sizes(mixer)

    def out(tensors: list[Tensor]) -> list[Tensor]:
        return by_head([*tensors[0].split(qkv), tensors[1]], sizes.heads)

    def back(tensors: list[Tensor]) -> list[Tensor]:
        q, k, v, gate = of_head(tensors[0], sizes.heads, (sizes.key, sizes.key, each * sizes.value, each * sizes.value))
        return [torch.cat([q, k, v]), gate]

    yield Group((f"{ours}.qkv.weight", f"{ours}.gate.weight"), (f"{theirs}.in_proj_qkvz.weight",), out, back)
    yield Group(
        (f"{ours}.beta.weight", f"{ours}.decay.weight"),
        (f"{theirs}.in_proj_ba.weight",),
        lambda tensors: by_head(tensors, sizes.heads),
        lambda tensors: of_head(tensors[0], sizes.heads, (each, each)),
    )
    yield taps(f"{ours}.conv", f"{theirs}.conv1d.weight")
    yield same(f"{ours}.A_log", f"{theirs}.A_log", wide=True)
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias", wide=True)
    yield same(f"{ours}.norm", f"{theirs}.norm.weight")
    yield same(f"{ours}.out.weight", f"{theirs}.out_proj.weight")


def gated_attention(config: DecoderConfig, mixer: AttentionConfig, ours: str, theirs: str) -> Iterator[Group]:
    """Their query projection holds, head by head, the query's rows and then the gate's."""
    sizes = parts.attention_sizes(config, mixer)
    size = sizes[0] // mixer.heads
    out, back = _with_gate(sizes, mixer.heads, size)
    for part in ["weight", "bias"] if mixer.qkv_bias else ["weight"]:
        names = tuple(f"{theirs}.{p}_proj.{part}" for p in parts.PARTS)
        yield Group((f"{ours}.qkv.{part}", f"{ours}.gate.{part}"), names, out, back)
    yield from parts.attention_rest(mixer, ours, theirs)


def _with_gate(sizes: Sequence[int], heads: int, size: int) -> tuple[Arrange, Arrange]:
    def out(tensors: list[Tensor]) -> list[Tensor]:
        query, key, value = tensors[0].split(list(sizes))
        return [*by_head([query, tensors[1]], heads), key, value]

    def back(tensors: list[Tensor]) -> list[Tensor]:
        query, gate = of_head(tensors[0], heads, (size, size))
        return [torch.cat([query, *tensors[1:]]), gate]

    return out, back


def by_head(tensors: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Several tensors whose rows are head by head -> one, in which the first head's rows of all come first."""
    return [torch.cat([t.unflatten(0, (heads, -1)) for t in tensors], dim=1).flatten(0, 1)]


def of_head(tensor: Tensor, heads: int, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse: sizes are the rows of one head in each."""
    return [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, -1)).split(list(sizes), dim=1)]


def limits(config: DecoderConfig) -> list[str]:
    found = [f"model.mixers.*.{line}" for line in parts.even_rotation(config, parts.first(config, AttentionConfig))]
    linear = parts.first(config, GatedDeltaNetConfig)
    return found + ([] if linear is not None else ["model.layers has no gated_delta_net: use qwen3_moe or llama"])


FORMAT = Format(
    "qwen3_next",
    "Qwen3-Next",
    "Qwen3NextForCausalLM",
    ("gated_delta_net", "attention"),
    ("moe", "swiglu"),
    write,
    read,
    weights,
    limits,
)
