"""ZAYA1: compressed convolutional attention, experts behind a router that averages over depth, scaled residuals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs, rope_of
from pretrain.checkpoint.interop.weights import Absent, Group, rows, same, shaped, taps, turned
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.zaya_moe import ZayaMoEConfig
from pretrain.model.mixers.cca import CCAConfig
from pretrain.model.rotary import rotary_channels

# Layers of the two kinds differ by their window, and each kind has positions of its own.
TYPES = ("hybrid", "hybrid_sliding")
THETA = {"hybrid": 5e6, "hybrid_sliding": 1e4}


def write(config: DecoderConfig) -> dict[str, Any]:
    mixer, ffn = parts.first(config, CCAConfig), parts.first(config, ZayaMoEConfig)
    assert mixer is not None and ffn is not None
    kinds = [TYPES[found.window is not None] for _, found, _ in parts.sublayers(config)]
    ropes = {kind: rope_of(0.5, THETA[kind]) for kind in TYPES}
    windows = [found.window for _, found, _ in parts.sublayers(config) if found.window is not None]
    for kind, (_, found, _) in reversed(list(zip(kinds, parts.sublayers(config)))):
        ropes[kind] = {"partial_rotary_factor": 1.0, **rope_of(found.rope_fraction, found.rope_theta)}
    return {
        **parts.write_top(config),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.head_dim,
        "attention_bias": False,
        "cca_time0": mixer.depthwise_taps,
        "cca_time1": mixer.grouped_taps,
        "layer_types": kinds,
        "sliding_window": windows[0] if windows else None,
        "rope_parameters": ropes,
        "num_experts": ffn.experts,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": ffn.hidden,
        "router_hidden_size": ffn.router_width,
        "rms_norm_eps": config.norm_eps,
        "lm_head_bias": False,
    }


def read(theirs: Theirs) -> dict[str, Any]:
    top = parts.read_top(theirs, tied=True, eps_default=1e-5)
    types = theirs.get("layer_types", default=[TYPES[0]] * theirs.need("num_hidden_layers"))
    parts.check_types(theirs, types, TYPES)
    for key, value in (("attention_bias", False), ("lm_head_bias", False), ("num_experts_per_tok", 1)):
        theirs.only(key, value)
    heads, window = theirs.get("num_attention_heads", default=8), theirs.get("sliding_window")
    common = {
        "kind": "cca",
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads", default=2),
        "head_dim": theirs.get("head_dim", default=128),
        "depthwise_taps": theirs.get("cca_time0", default=2),
        "grouped_taps": theirs.get("cca_time1", default=2),
    }
    of_type = dict(zip(TYPES, ("cca", "window")))
    mixers: dict[str, Any] = {}
    for kind in TYPES:
        if kind in types:
            mixers[of_type[kind]] = {**common, **theirs.rope(kind, 0.5, THETA[kind])}
    if TYPES[1] in types:
        mixers["window"]["window"] = window
    moe = {
        "kind": "zaya_moe",
        "experts": theirs.get("num_experts", default=16),
        "hidden": theirs.get("moe_intermediate_size", default=2048),
        "router_width": theirs.get("router_hidden_size", default=256),
        "norm_eps": top["norm_eps"],
        "skip": "zero",
    }
    return {
        **top,
        "mixers": mixers,
        "ffns": {"moe": moe},
        "block": {"residual_scaling": True},
        **parts.pattern([f"{of_type[kind]} + moe" for kind in types]),
    }


def weights(config: DecoderConfig) -> Iterator[Group | Absent]:
    yield from parts.ends(config)
    for name in ("scale", "bias"):
        yield same(f"embedding_{name}", f"model.input_hidden_states_{name}")
    for index, mixer, _ in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield from parts.pre_norms(ours, theirs)
        for mine, other in (("mixer_merge", "post_attention_residual_scale"), ("ffn_merge", "post_mlp_residual_scale")):
            for name in ("scale", "bias"):
                yield same(f"{ours}.{mine}.stream_{name}", f"{theirs}.{other}.residual_{name}")
                yield same(f"{ours}.{mine}.output_{name}", f"{theirs}.{other}.hidden_states_{name}")
        yield from attention(mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        yield from experts(index == 0, f"{ours}.ffn", f"{theirs}.mlp")


def attention(mixer: CCAConfig, ours: str, theirs: str) -> Iterator[Group]:
    size, kv = mixer.head_dim, (mixer.kv_heads or mixer.heads) * mixer.head_dim
    heads = mixer.heads + (mixer.kv_heads or mixer.heads)
    names = [f"{theirs}.qkv_proj.{name}.weight" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")]
    yield rows(f"{ours}.qkv.weight", names, [mixer.heads * size, kv, kv // 2, kv // 2])
    yield taps(f"{ours}.depthwise", f"{theirs}.qkv_proj.conv_qk_depthwise.weight")
    yield same(f"{ours}.depthwise_bias", f"{theirs}.qkv_proj.conv_qk_depthwise.bias")

    def out(w: Tensor) -> Tensor:
        """[heads, tap * in, out] -> [heads * out, in, tap]."""
        return w.unflatten(1, (mixer.grouped_taps, size)).permute(0, 3, 2, 1).flatten(0, 1)

    def back(w: Tensor) -> Tensor:
        return w.unflatten(0, (heads, size)).permute(0, 3, 2, 1).flatten(1, 2)

    yield shaped(f"{ours}.grouped", f"{theirs}.qkv_proj.conv_qk_grouped.weight", out, back)
    yield same(f"{ours}.grouped_bias", f"{theirs}.qkv_proj.conv_qk_grouped.bias")
    yield same(f"{ours}.temperature", f"{theirs}.qk_norm.temp")
    yield same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def experts(first: bool, ours: str, theirs: str) -> Iterator[Group | Absent]:
    router, gate = f"{ours}.router", f"{theirs}.gate"
    for name in ("weight", "bias"):
        yield same(f"{router}.down.{name}", f"{gate}.down_proj.{name}")
        yield same(f"{router}.fc1.{name}", f"{gate}.router_mlp.fc1.{name}")
        yield same(f"{router}.fc2.{name}", f"{gate}.router_mlp.fc2.{name}")
    if not first:
        yield same(f"{router}.gamma", f"{gate}.router_states_scale")
    yield same(f"{router}.norm.weight", f"{gate}.router_mlp.norm.weight")
    yield same(f"{router}.out.weight", f"{gate}.router_mlp.out_proj.weight")
    yield same(f"{router}.bias", f"{gate}.balancing_biases", wide=True)
    for name in ("bias_mean", "bias_square", "bias_steps"):
        yield Absent(f"{router}.{name}")  # the controller's, which starts anew
    yield turned(f"{ours}.gate_up", f"{theirs}.experts.gate_up_proj")
    yield turned(f"{ours}.down", f"{theirs}.experts.down_proj")


def limits(config: DecoderConfig) -> list[str]:
    found = []
    names = list(dict.fromkeys(layer.ffn for layer in config.pattern()))
    if len(names) > 1:
        found.append(
            f"model.ffns {names[0]} and {names[1]}: ZAYA1 has one for all layers, or its router does not average"
        )
    for name, mixer in config.mixers.items():
        if isinstance(mixer, CCAConfig):
            share = int(mixer.head_dim * mixer.rope_fraction)
            if share != rotary_channels(mixer.head_dim, mixer.rope_fraction):
                found.append(
                    f"model.mixers.{name}.rope_fraction = {mixer.rope_fraction}: an odd number of channels, {share}"
                )
    return found


NOTE = "transformers 5.23 sets the bias of every router's skip choice to -1 after loading, whatever the folder says"
FORMAT = Format("zaya", "ZAYA1", "ZayaForCausalLM", ("cca",), ("zaya_moe",), write, read, weights, limits, NOTE)
