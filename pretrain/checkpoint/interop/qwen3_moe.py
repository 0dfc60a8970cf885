"""Qwen3-MoE: attention with q/k norms per head, and softmax-routed experts, or SwiGLU in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs, rope_of
from pretrain.checkpoint.interop.weights import Absent, Group
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.moe import MoEConfig
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.mixers.attention import AttentionConfig


def write(config: DecoderConfig) -> dict[str, Any]:
    attention = parts.first(config, AttentionConfig)
    assert attention is not None
    window = {} if attention.window is None else {"use_sliding_window": True, "sliding_window": attention.window}
    return {
        **parts.write_top(config),
        **parts.write_attention(config, attention),
        **write_experts(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_of(1.0, attention.rope_theta),
        **window,
    }


def write_experts(config: DecoderConfig) -> dict[str, Any]:
    """The keys that Qwen3-MoE and Qwen3-Next share."""
    dense, moe = parts.first(config, SwiGLUConfig), parts.first(config, MoEConfig)
    plain_layers = [index for index, _, ffn in parts.sublayers(config) if isinstance(ffn, SwiGLUConfig)]
    found: dict[str, Any] = {"num_experts": 0, "mlp_only_layers": plain_layers, "decoder_sparse_step": 1}
    if moe is not None:
        found |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden,
            "norm_topk_prob": moe.normalize,
        }
    return found | ({} if dense is None else {"intermediate_size": dense.hidden})


def read(theirs: Theirs) -> dict[str, Any]:
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", default=False) else None
    theirs.get("sliding_window")
    top = parts.read_top(theirs)
    attention = {
        **parts.read_attention(theirs), **theirs.rope(), "qk_norm": True, "norm_eps": top["norm_eps"], "window": window,
    }  # fmt: skip
    ffns, names = read_experts(theirs, normalize=False)
    return {
        **top,
        "mixers": {"attention": attention},
        "ffns": ffns,
        **parts.pattern([f"attention + {name}" for name in names]),
    }


def read_experts(theirs: Theirs, *, normalize: bool) -> tuple[dict[str, Any], list[str]]:
    """(ffns, the name of each layer's). normalize: norm_topk_prob when config.json does not say."""
    experts, count = theirs.get("num_experts", "num_local_experts", default=0), theirs.need("num_hidden_layers")
    dense, step = theirs.get("mlp_only_layers", default=[]), theirs.get("decoder_sparse_step", default=1)
    names = [
        "moe" if index not in dense and experts > 0 and (index + 1) % step == 0 else "swiglu" for index in range(count)
    ]
    ffns: dict[str, Any] = {}
    hidden = theirs.get("intermediate_size")
    if "swiglu" in names:
        ffns["swiglu"] = {"kind": "swiglu", "hidden": hidden or theirs.need("intermediate_size")}
    keys = ("num_experts_per_tok", "moe_intermediate_size")
    chosen = theirs.get("norm_topk_prob", default=normalize)
    if "moe" in names:
        ffns["moe"] = {
            "kind": "moe",
            "experts": experts,
            **dict(zip(("top_k", "hidden"), map(theirs.need, keys))),
            "gate": "softmax",
            "normalize": chosen,
            "bias_rate": 0.0,  # the format has no balancing bias
        }
    else:
        for key in keys:
            theirs.get(key)
    return ffns, names


def weights(config: DecoderConfig) -> Iterator[Group | Absent]:
    yield from parts.ends(config)
    for index, mixer, ffn in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield from parts.pre_norms(ours, theirs)
        yield from parts.attention(config, mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        yield from parts.qwen_ffn(ffn, f"{ours}.ffn", f"{theirs}.mlp")


FORMAT = Format(
    "qwen3_moe", "Qwen3-MoE", "Qwen3MoeForCausalLM", ("attention",), ("moe", "swiglu"), write, read, weights
)
