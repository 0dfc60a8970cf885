"""OLMo Hybrid: Gated DeltaNet with norms before the sublayers, attention with norms after them and over all heads' q and k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs, rope_of
from pretrain.checkpoint.interop.weights import Group, rows, same, taps
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.mixers.attention import AttentionConfig
from pretrain.model.mixers.gated_delta_net import GatedDeltaNetConfig

TYPES = ("linear_attention", "full_attention")


def write(config: DecoderConfig) -> dict[str, Any]:
    attention, linear = parts.first(config, AttentionConfig), parts.first(config, GatedDeltaNetConfig)
    ffn = parts.first(config, SwiGLUConfig)
    assert ffn is not None
    found = {
        **parts.write_top(config),
        "intermediate_size": ffn.hidden,
        "rms_norm_eps": config.norm_eps,
        "layer_types": parts.layer_types(config, GatedDeltaNetConfig),
    }
    if attention is not None:
        found |= parts.write_attention(config, attention)
        found["rope_parameters"] = rope_of(float(attention.rope_fraction > 0), attention.rope_theta)
    if linear is not None:
        found |= {**parts.write_delta_net(linear), "linear_allow_neg_eigval": linear.negative_eigenvalues}
    return found


def read(theirs: Theirs) -> dict[str, Any]:
    top, count = parts.read_top(theirs), theirs.need("num_hidden_layers")
    default = [TYPES[index % 4 == 3] for index in range(count)]
    types = theirs.get("layer_types", default=default if count > 3 else [*default[:-1], TYPES[1]])
    parts.check_types(theirs, types, TYPES)
    heads = theirs.need("num_attention_heads")
    keys = theirs.get("linear_num_key_heads", default=heads)
    size = theirs.get("linear_key_head_dim", default=int(0.75 * top["width"] / keys))
    for key in ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"):
        theirs.get(key)  # where weights begin
    linear = {
        "kind": "gated_delta_net",
        "heads": keys,
        "value_heads": theirs.get("linear_num_value_heads", default=heads),
        "head_dim": size,
        "value_dim": theirs.get("linear_value_head_dim", default=2 * size),
        "conv_width": theirs.get("linear_conv_kernel_dim", default=4),
        "negative_eigenvalues": theirs.get("linear_allow_neg_eigval", default=True),
        "norm_eps": 1e-5,  # whatever rms_norm_eps says
    }
    attention = {
        **parts.read_attention(theirs),
        **theirs.rope(),
        "qk_norm": True,
        "qk_norm_over": "width",
        "norm_eps": top["norm_eps"],
    }
    of_type = dict(zip(TYPES, ("gdn", "attention")))
    return {
        **top,
        "mixers": {"gdn": linear, "attention": attention},
        "ffns": {"swiglu": {"kind": "swiglu", "hidden": theirs.need("intermediate_size")}},
        "block": {"norm": "pre", "norm_of": {"attention": "post"}},
        **parts.pattern([f"{of_type[kind]} + swiglu" for kind in types]),
    }


def weights(config: DecoderConfig) -> Iterator[Group]:
    yield from parts.ends(config)
    for index, mixer, ffn in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        # Released folders call the norms of the linear layers attention_layer_norm and feedforward_layer_norm. transformers
        # writes those names into any folder, for attention layers too; it reads either.
        if isinstance(mixer, GatedDeltaNetConfig):
            yield same(
                f"{ours}.mixer_norm.weight", f"{theirs}.attention_layer_norm.weight", f"{theirs}.input_layernorm.weight"
            )
            yield same(
                f"{ours}.ffn_norm.weight",
                f"{theirs}.feedforward_layer_norm.weight",
                f"{theirs}.post_attention_layernorm.weight",
            )
            yield from delta_net(mixer, f"{ours}.mixer", f"{theirs}.linear_attn")
        else:
            yield same(
                f"{ours}.mixer_out_norm.weight",
                f"{theirs}.post_attention_layernorm.weight",
                f"{theirs}.feedforward_layer_norm.weight",
            )
            yield same(f"{ours}.ffn_out_norm.weight", f"{theirs}.post_feedforward_layernorm.weight")
            yield from parts.attention(config, mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        yield from parts.swiglu(f"{ours}.ffn", f"{theirs}.mlp", ffn.hidden)


def delta_net(mixer: GatedDeltaNetConfig, ours: str, theirs: str) -> Iterator[Group]:
    sizes = parts.delta_sizes(mixer)
    yield rows(f"{ours}.qkv.weight", [f"{theirs}.{p}_proj.weight" for p in parts.PARTS], sizes)
    yield taps(f"{ours}.conv", f"{theirs}.conv1d.weight", [f"{theirs}.{p}_conv1d.weight" for p in parts.PARTS], sizes)
    for mine, other in (("decay", "a"), ("beta", "b"), ("gate", "g"), ("out", "o")):
        yield same(f"{ours}.{mine}.weight", f"{theirs}.{other}_proj.weight")
    yield same(f"{ours}.norm", f"{theirs}.o_norm.weight")
    yield same(f"{ours}.A_log", f"{theirs}.A_log", wide=True)
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias", wide=True)


def limits(config: DecoderConfig) -> list[str]:
    kinds = {type(mixer) for _, mixer, _ in parts.sublayers(config)}
    wanted = {AttentionConfig: "attention", GatedDeltaNetConfig: "gated_delta_net"}
    return [f"model.layers has no {name}: OLMo Hybrid has some" for kind, name in wanted.items() if kind not in kinds]


FORMAT = Format(
    "olmo_hybrid",
    "OLMo Hybrid",
    "OlmoHybridForCausalLM",
    ("gated_delta_net", "attention"),
    ("swiglu",),
    write,
    read,
    weights,
    limits,
)
