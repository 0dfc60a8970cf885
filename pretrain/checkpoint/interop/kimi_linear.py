"""Kimi Linear: Kimi Delta Attention and latent attention without positions; experts as in DeepSeek-V3, or SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.checkpoint.interop import parts
from pretrain.checkpoint.interop.form import Format
from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.interop.weights import Group, down, gate_up, rows, same, shaped, taps
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.moe import MoEConfig
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.mixers.kimi_delta_attention import KimiDeltaAttentionConfig
from pretrain.model.mixers.mla import MLAConfig

TYPES = ("linear_attention", "full_attention")


def write(config: DecoderConfig) -> dict[str, Any]:
    linear, latent = parts.first(config, KimiDeltaAttentionConfig), parts.first(config, MLAConfig)
    dense, moe = parts.first(config, SwiGLUConfig), parts.first(config, MoEConfig)
    found = {
        **parts.write_top(config),
        "rms_norm_eps": config.norm_eps,
        "layer_types": parts.layer_types(config, KimiDeltaAttentionConfig),
        "mlp_layer_types": [
            "sparse" if isinstance(ffn, MoEConfig) else "dense" for _, _, ffn in parts.sublayers(config)
        ],
    }
    if linear is not None:
        found |= {
            "linear_num_heads": linear.heads,
            "linear_head_dim": linear.head_dim,
            "linear_conv_kernel_dim": linear.conv_width,
        }
    if latent is not None:
        found |= {
            "num_attention_heads": latent.heads,
            "num_key_value_heads": latent.heads,
            "kv_lora_rank": latent.kv_rank,
            "q_lora_rank": latent.query_rank,
            "qk_nope_head_dim": latent.head_dim,
            "qk_rope_head_dim": latent.shared_dim,
            "v_head_dim": latent.value_dim or latent.head_dim,
        }
    if dense is not None:
        found["intermediate_size"] = dense.hidden
    if moe is not None:
        found |= {
            "num_experts": moe.experts,
            "num_experts_per_token": moe.top_k,
            "moe_intermediate_size": moe.hidden,
            "num_shared_experts": moe.shared_hidden // moe.hidden,
            "moe_renormalize": moe.normalize,
            "routed_scaling_factor": moe.route_scale,
            "num_expert_group": moe.groups,
            "topk_group": moe.top_groups,
        }
    return found


def read(theirs: Theirs) -> dict[str, Any]:
    top, count = parts.read_top(theirs, eps_default=1e-5), theirs.need("num_hidden_layers")
    top["tie_embeddings"] = False  # the class does not tie them, whatever config.json says
    own = theirs.get("linear_attn_config", default={})
    types = theirs.get("layer_types") or _types(own, count)
    parts.check_types(theirs, types, TYPES)
    theirs.only("attention_bias", False)
    theirs.only("moe_router_activation_func", "sigmoid")
    theirs.only("moe_layer_freq", 1)
    # Derived from others, or not used by the class.
    for key in ("head_dim", "qk_head_dim", "num_key_value_heads", "mla_use_nope", "use_grouped_topk", "rope_theta"):
        theirs.get(key)
    for key in ("rope_scaling", "rope_parameters", "num_nextn_predict_layers"):
        theirs.get(key)
    eps = top["norm_eps"]
    mixers: dict[str, Any] = {}
    if TYPES[0] in types:
        mixers["kda"] = {
            "kind": "kda",
            "heads": own.get("num_heads") or theirs.get("linear_num_heads", default=32),
            "head_dim": own.get("head_dim") or theirs.get("linear_head_dim", default=128),
            "conv_width": own.get("short_conv_kernel_size") or theirs.get("linear_conv_kernel_dim", default=4),
            "norm_eps": eps,
        }
    latent = {
        "kind": "mla",
        "heads": theirs.get("num_attention_heads", default=32),
        "kv_rank": theirs.get("kv_lora_rank", default=512),
        "query_rank": theirs.get("q_lora_rank"),
        "head_dim": theirs.get("qk_nope_head_dim", default=128),
        "shared_dim": theirs.get("qk_rope_head_dim", default=64),
        "value_dim": theirs.get("v_head_dim", default=128),
    }
    if TYPES[1] in types:
        mixers["mla"] = latent
    ffns, names = _ffns(theirs, count)
    of_type = dict(zip(TYPES, ("kda", "mla")))
    return {
        **top,
        "mixers": mixers,
        "ffns": ffns,
        **parts.pattern([f"{of_type[kind]} + {name}" for kind, name in zip(types, names)]),
    }


def _types(own: dict[str, Any], count: int) -> list[str]:
    """Released folders number the layers of each kind from 1."""
    if "full_attn_layers" in own:
        return [TYPES[index + 1 in own["full_attn_layers"]] for index in range(count)]
    return [TYPES[index > 0 and index % 4 == 0] for index in range(count)]


def _ffns(theirs: Theirs, count: int) -> tuple[dict[str, Any], list[str]]:
    """(ffns, the name of each layer's)."""
    before = theirs.get("first_k_dense_replace", default=1)
    sorts = theirs.get("mlp_layer_types", default=["dense"] * before + ["sparse"] * (count - before))
    names = ["moe" if sort == "sparse" else "swiglu" for sort in sorts[:count]]
    hidden, own = theirs.get("intermediate_size", default=9216), theirs.get("moe_intermediate_size", default=1024)
    moe = {
        "kind": "moe",
        "experts": theirs.get("num_experts", "num_local_experts", default=256),
        "top_k": theirs.get("num_experts_per_token", "num_experts_per_tok", default=8),
        "hidden": own,
        "shared_hidden": own * theirs.get("num_shared_experts", "n_shared_experts", default=1),
        "gate": "sigmoid",
        "normalize": theirs.get("moe_renormalize", "norm_topk_prob", default=True),
        "route_scale": theirs.get("routed_scaling_factor", default=2.446),
        "groups": theirs.get("num_expert_group", "n_group", default=1),
        "top_groups": theirs.get("topk_group", default=1),
    }
    ffns: dict[str, Any] = {"swiglu": {"kind": "swiglu", "hidden": hidden}, "moe": moe}
    return {name: ffn for name, ffn in ffns.items() if name in names}, names


def weights(config: DecoderConfig) -> Iterator[Group]:
    yield from parts.ends(config)
    for index, mixer, ffn in parts.sublayers(config):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        yield from parts.pre_norms(ours, theirs)
        if isinstance(mixer, KimiDeltaAttentionConfig):
            yield from delta_attention(mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        else:
            yield from latent_attention(mixer, f"{ours}.mixer", f"{theirs}.self_attn")
        # transformers writes block_sparse_moe for dense layers, too, and reads either name for both.
        dense, sparse = f"{theirs}.mlp", f"{theirs}.block_sparse_moe"
        if isinstance(ffn, MoEConfig):
            yield from experts(ffn, f"{ours}.ffn", sparse)
        else:
            yield from parts.swiglu(f"{ours}.ffn", dense, ffn.hidden, sparse)


def delta_attention(mixer: KimiDeltaAttentionConfig, ours: str, theirs: str) -> Iterator[Group]:
    sizes = parts.delta_sizes(mixer)
    yield rows(f"{ours}.qkv.weight", [f"{theirs}.{p}_proj.weight" for p in parts.PARTS], sizes)
    yield taps(f"{ours}.conv", f"{theirs}.conv1d.weight", [f"{theirs}.{p}_conv1d.weight" for p in parts.PARTS], sizes)
    for mine, other in (("decay", "f"), ("gate", "g")):
        yield same(f"{ours}.{mine}.down.weight", f"{theirs}.{other}_a_proj.weight")
        yield same(f"{ours}.{mine}.up.weight", f"{theirs}.{other}_b_proj.weight")
    yield shaped(f"{ours}.A_log", f"{theirs}.A_log", lambda a: a.view(1, 1, -1, 1), lambda a: a.flatten(), wide=True)
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias", wide=True)
    yield same(f"{ours}.beta.weight", f"{theirs}.b_proj.weight")
    yield same(f"{ours}.norm", f"{theirs}.o_norm.weight")
    yield same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def latent_attention(mixer: MLAConfig, ours: str, theirs: str) -> Iterator[Group]:
    if mixer.query_rank is None:
        yield same(f"{ours}.query.weight", f"{theirs}.q_proj.weight")
    else:
        yield same(f"{ours}.query_down.weight", f"{theirs}.q_a_proj.weight")
        yield same(f"{ours}.query_norm", f"{theirs}.q_a_layernorm.weight")
        yield same(f"{ours}.query.weight", f"{theirs}.q_b_proj.weight")
    yield same(f"{ours}.kv_down.weight", f"{theirs}.kv_a_proj_with_mqa.weight")
    yield same(f"{ours}.kv_norm", f"{theirs}.kv_a_layernorm.weight")
    yield same(f"{ours}.kv_up.weight", f"{theirs}.kv_b_proj.weight")
    yield same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def experts(ffn: MoEConfig, ours: str, theirs: str) -> Iterator[Group]:
    yield same(f"{ours}.router.weight", f"{theirs}.gate.weight")
    yield same(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias", wide=True)
    yield gate_up(f"{ours}.gate_up", f"{theirs}.experts", "w1", "w3", ffn.experts)
    yield down(f"{ours}.down", f"{theirs}.experts", "w2", ffn.experts)
    yield from parts.swiglu(f"{ours}.shared", f"{theirs}.shared_experts", ffn.shared_hidden)


def limits(config: DecoderConfig) -> list[str]:
    moe = parts.first(config, MoEConfig)
    if moe is None or moe.shared_hidden > 0:
        return []
    return ["model.ffns.*.shared_hidden = 0: Kimi Linear always has a shared expert"]


FORMAT = Format(
    "kimi_linear",
    "Kimi Linear",
    "KimiLinearForCausalLM",
    ("kda", "mla"),
    ("moe", "swiglu"),
    write,
    read,
    weights,
    limits,
)
