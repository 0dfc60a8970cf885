"""A tiny model of each family: what tests of the whole family run over."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.sublayer import FFNConfig, MixerConfig, SublayerConfig

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "heads": 4, "kv_heads": 2, "rope_fraction": 0.5},
    "gated_attention": {
        "kind": "attention",
        "heads": 2,
        "kv_heads": 1,
        "zero_centered_norm": True,
        "output_gate": True,
    },
    "wide_attention": {"kind": "attention", "heads": 3, "head_dim": 16, "qk_norm_over": "width", "window": 20},
    "conv_attention": {"kind": "attention", "heads": 2, "conv_width": 3},
    "cca": {"kind": "cca", "heads": 4, "kv_heads": 2, "head_dim": 8},
    "mla": {"kind": "mla", "heads": 2, "kv_rank": 12, "head_dim": 8, "shared_dim": 4, "rope": True},
    "smha": {"kind": "smha", "heads": 4, "top_k": 2},
    "smha_threshold": {"kind": "smha", "heads": 4, "select": "threshold", "mean_load": 0.5},
    "linear_attention": {"kind": "linear_attention", "heads": 2},
    "gla": {"kind": "gla", "heads": 2},
    "hgrn2": {"kind": "hgrn2", "heads": 2},
    "retnet": {"kind": "retnet", "heads": 2},
    "delta_net": {"kind": "delta_net", "heads": 2, "head_dim": 16},
    "gated_delta_net": {"kind": "gated_delta_net", "heads": 1, "value_heads": 2, "head_dim": 16},
    "kda": {"kind": "kda", "heads": 2, "head_dim": 16},
    "kda_safe": {"kind": "kda", "heads": 2, "head_dim": 16, "safe_gate": True},
    "mamba": {"kind": "mamba", "state_dim": 8},
    "mamba2": {"kind": "mamba2", "head_dim": 16, "state_dim": 16, "groups": 2},
}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"kind": "swiglu", "hidden": 64},
    "geglu": {"kind": "geglu", "hidden": 64},
    "bilinear": {"kind": "bilinear", "hidden": 64},
    "mlp": {"kind": "mlp", "hidden": 96, "activation": "relu2"},
    "kat": {"kind": "kat", "hidden": 96, "groups": 4},
    "hourglass": {"kind": "hourglass", "hidden": 16, "depth": 3},
    "hourglass_lifted": {"kind": "hourglass", "hidden": [16, 24], "lift": 48},
    "fused": {"kind": "fused", "hidden": 24, "parts": 3},
    "moe": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 32, "shared_hidden": 32, "sequence_loss": 1e-3},
    "moe_softmax": {
        "kind": "moe", "experts": 4, "top_k": 2, "hidden": 32, "shared_hidden": 32, "shared_gate": True, "gate": "softmax",
        "bias_rate": 0.0, "batch_loss": 0.01, "z_loss": 1e-3,
    },
    "zaya_moe": {"kind": "zaya_moe", "experts": 4, "hidden": 32, "router_width": 16, "skip": "zero"},
    "union_of_experts": {"kind": "union_of_experts", "hidden": 64, "experts": 4, "top_k": 2, "balance_loss": 0.01},
    "union_threshold": {
        "kind": "union_of_experts", "hidden": 64, "experts": 4, "select": "threshold", "mean_load": 0.5, "patch": 4,
        "expert_select": "prefix", "kept": 3, "expert_patch": 8,
    },
}  # fmt: skip


def _of_mixer(name: str) -> dict[str, Any]:
    return {"mixers": {name: MIXERS[name]}, "ffns": {"swiglu": FFNS["swiglu"]}, "layers": [f"{name} + swiglu x2"]}


def _of_ffn(name: str) -> dict[str, Any]:
    return {
        "mixers": {"attention": MIXERS["attention"]},
        "ffns": {name: FFNS[name]},
        "layers": [f"attention + {name} x2"],
    }


def _mixed(*layers: str, **more: Any) -> dict[str, Any]:
    named = set(" ".join(layers).replace("+", " ").split())
    return {
        "mixers": {name: config for name, config in MIXERS.items() if name in named},
        "ffns": {name: config for name, config in FFNS.items() if name in named},
        "layers": list(layers),
        **more,
    }


FAMILIES: dict[str, dict[str, Any]] = {
    **{f"mixer {name}": _of_mixer(name) for name in MIXERS},
    **{f"ffn {name}": _of_ffn(name) for name in FFNS if name != "swiglu"},  # that is the first one above
    "Mamba-2, one sublayer a layer": _mixed("mamba2 x3"),
    "Qwen3-Next": _mixed(
        "gated_delta_net + moe_softmax", "gated_attention + moe_softmax", block={"zero_centered_norms": True}
    ),
    "Kimi-Linear": _mixed("kda + swiglu", "mla + moe"),
    "OLMo Hybrid": _mixed("gated_delta_net + swiglu", "attention + swiglu", block={"norm_of": {"attention": "post"}}),
    "ZAYA1": _mixed("cca + zaya_moe x2", block={"residual_scaling": True}),
    "Union of Experts": _mixed("smha + union_of_experts x2"),
    "Peri-LN": {**_of_mixer("attention"), "block": {"norm": "peri"}},
    "parallel sublayers": {**_of_mixer("gla"), "block": {"parallel": True}},
    "multi-token": _mixed("attention + swiglu", "gla + moe", multi_token={"layer": "attention + moe"}),
}


def config(family: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.model_validate({"vocabulary": 256, "width": 32, **FAMILIES[family], **changes})


def build(family: str, seed: int = 0, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config(family, **changes))


def kinds(base: type[SublayerConfig]) -> set[str]:
    """Every kind that a configuration can name."""
    found: set[str] = set()
    for child in base.__subclasses__():
        if "kind" in child.model_fields:
            found.add(child.model_fields["kind"].default)
        found |= kinds(child)
    return found


ALL_KINDS = {"mixers": kinds(MixerConfig), "ffns": kinds(FFNConfig)}
