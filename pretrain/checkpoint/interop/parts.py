"""What several formats share: attention, SwiGLU, experts, embedding and head; and layers as a pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.interop.weights import Absent, Group, down, gate_up, rows, same
from pretrain.model.decoder import DecoderConfig
from pretrain.model.ffns.moe import MoEConfig
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.linear_parts import Heads, grouped_heads
from pretrain.model.mixers.attention import AttentionConfig
from pretrain.model.mixers.gated_delta_net import GatedDeltaNetConfig
from pretrain.model.mixers.kimi_delta_attention import KimiDeltaAttentionConfig
from pretrain.model.rotary import rotary_channels
from pretrain.model.sublayer import SublayerConfig

C = TypeVar("C", bound=SublayerConfig)
PARTS = ("q", "k", "v")


def first(config: DecoderConfig, kind: type[C]) -> C | None:
    """The first sublayer of that class in the order of the layers. Others must agree, or reading back shows the difference."""
    for layer in config.pattern():
        for name, defined in ((layer.mixer, config.mixers), (layer.ffn, config.ffns)):
            found: SublayerConfig | None = None if name is None else defined[name]
            if isinstance(found, kind):
                return found
    return None


def sublayers(config: DecoderConfig) -> Iterator[tuple[int, Any, Any]]:
    """(number of the layer, its mixer's config, its FFN's config); None where it has none."""
    for index, layer in enumerate(config.pattern()):
        mixer = None if layer.mixer is None else config.mixers[layer.mixer]
        yield index, mixer, None if layer.ffn is None else config.ffns[layer.ffn]


# config.json ---------------------------------------------------------------------------------------------------------


def write_top(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.pattern()),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def read_top(
    theirs: Theirs, *, tied: bool = False, eps: str = "rms_norm_eps", eps_default: float = 1e-6
) -> dict[str, Any]:
    """tied: whether embeddings are, when config.json does not say."""
    theirs.only("hidden_act", "silu")
    theirs.only("quantization_config", None)
    return {
        "vocabulary": theirs.need("vocab_size"),
        "width": theirs.need("hidden_size"),
        "tie_embeddings": theirs.get("tie_word_embeddings", default=tied),
        "norm_eps": theirs.get(eps, default=eps_default),
        "init_std": theirs.get("initializer_range", default=0.02),
    }


def write_attention(config: DecoderConfig, attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim or config.width // attention.heads,
        "attention_bias": attention.qkv_bias,
    }


def read_attention(theirs: Theirs) -> dict[str, Any]:
    heads, bias = theirs.need("num_attention_heads"), theirs.get("attention_bias", default=False)
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads", default=heads),
        "head_dim": theirs.get("head_dim", default=theirs.need("hidden_size") // heads),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def write_delta_net(linear: GatedDeltaNetConfig) -> dict[str, Any]:
    sizes = heads_of(linear)
    return {
        "linear_num_key_heads": sizes.heads,
        "linear_num_value_heads": sizes.value_heads,
        "linear_key_head_dim": sizes.key,
        "linear_value_head_dim": sizes.value,
        "linear_conv_kernel_dim": linear.conv_width,
    }


def layer_types(config: DecoderConfig, linear: type[SublayerConfig]) -> list[str]:
    kinds = (isinstance(mixer, linear) for _, mixer, _ in sublayers(config))
    return ["linear_attention" if is_linear else "full_attention" for is_linear in kinds]


def check_types(theirs: Theirs, types: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a kind of layer that is not among the known, or for another number of layers."""
    unknown = [kind for kind in types if kind not in known]
    if unknown:
        raise ValueError(f"{theirs.where}: layer_types has {unknown[0]!r}; only {', '.join(known)} are known here")
    count = theirs.need("num_hidden_layers")
    if len(types) != count:
        raise ValueError(f"{theirs.where}: layer_types names {len(types)} layers, but num_hidden_layers = {count}")


def pattern(layers: Sequence[str]) -> dict[str, Any]:
    """layers and repeat of a model section: ["a + f", "a + f", "b + f", "a + f", ...] -> ["a + f x2", "b + f"], repeated."""
    count = len(layers)
    period = next(p for p in range(1, count + 1) if count % p == 0 and list(layers[:p]) * (count // p) == list(layers))
    if period == 1:
        return {"layers": [f"{layers[0]} x{count}" if count > 1 else layers[0]]}
    runs = [(layer, len(list(same_ones))) for layer, same_ones in groupby(layers[:period])]
    entries = [f"{layer} x{times}" if times > 1 else layer for layer, times in runs]
    return {"layers": entries, "repeat": count // period}


def even_rotation(config: DecoderConfig, attention: AttentionConfig | None) -> list[str]:
    """They round a share of channels down to a whole number, we to an even one."""
    if attention is None:
        return []
    size = attention.head_dim or config.width // attention.heads
    if int(size * attention.rope_fraction) == rotary_channels(size, attention.rope_fraction):
        return []
    return [f"rope_fraction = {attention.rope_fraction} of head_dim = {size} is an odd number of channels"]


# Weights -------------------------------------------------------------------------------------------------------------


def ends(
    config: DecoderConfig, stem: str = "model", embedding: str = "embed_tokens", norm: str = "norm"
) -> Iterator[Group]:
    yield same("embedding.weight", f"{stem}.{embedding}.weight")
    yield same("norm.weight", f"{stem}.{norm}.weight")
    if not config.tie_embeddings:
        yield same("head.weight", "lm_head.weight")


def pre_norms(ours: str, theirs: str) -> Iterator[Group]:
    yield same(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
    yield same(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def attention_sizes(config: DecoderConfig, attention: AttentionConfig) -> tuple[int, int, int]:
    """Rows of query, key and value."""
    size = attention.head_dim or config.width // attention.heads
    kv = (attention.kv_heads or attention.heads) * size
    return attention.heads * size, kv, kv


def attention(config: DecoderConfig, mixer: AttentionConfig, ours: str, theirs: str) -> Iterator[Group]:
    """Without an output gate."""
    sizes = attention_sizes(config, mixer)
    for part in ["weight", "bias"] if mixer.qkv_bias else ["weight"]:
        yield rows(f"{ours}.qkv.{part}", [f"{theirs}.{p}_proj.{part}" for p in PARTS], sizes)
    yield from attention_rest(mixer, ours, theirs)


def attention_rest(mixer: AttentionConfig, ours: str, theirs: str) -> Iterator[Group]:
    yield same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")
    if mixer.out_bias:
        yield same(f"{ours}.out.bias", f"{theirs}.o_proj.bias")
    if mixer.qk_norm:
        for part in ("q", "k"):
            yield same(f"{ours}.{part}_norm", f"{theirs}.{part}_norm.weight")


def swiglu(ours: str, theirs: str, hidden: int, *other_stems: str) -> Iterator[Group]:
    yield _gated(ours, theirs, hidden, other_stems)
    yield same(f"{ours}.down.weight", *(f"{stem}.down_proj.weight" for stem in (theirs, *other_stems)))


def _gated(ours: str, theirs: str, hidden: int, other_stems: Sequence[str]) -> Group:
    def group(stem: str) -> Group:
        return rows(f"{ours}.gate_up.weight", [f"{stem}.{p}_proj.weight" for p in ("gate", "up")], [hidden, hidden])

    main = group(theirs)
    return Group(main.ours, main.theirs, main.out, main.back, tuple(group(stem) for stem in other_stems))


def qwen_ffn(ffn: SwiGLUConfig | MoEConfig, ours: str, theirs: str) -> Iterator[Group | Absent]:
    """SwiGLU or experts, without a shared expert, as in Qwen3-MoE and Qwen3-Next."""
    if isinstance(ffn, SwiGLUConfig):
        yield from swiglu(ours, theirs, ffn.hidden)
        return
    yield same(f"{ours}.router.weight", f"{theirs}.gate.weight")
    yield Absent(f"{ours}.router.bias", because="there is no balancing bias in that format's router")
    yield gate_up(f"{ours}.gate_up", f"{theirs}.experts", "gate_proj", "up_proj", ffn.experts)
    yield down(f"{ours}.down", f"{theirs}.experts", "down_proj", ffn.experts)


def heads_of(linear: GatedDeltaNetConfig | KimiDeltaAttentionConfig) -> Heads:
    return grouped_heads(linear.heads, linear.value_heads, linear.head_dim, linear.value_dim)


def delta_sizes(linear: GatedDeltaNetConfig | KimiDeltaAttentionConfig) -> tuple[int, int, int]:
    """Rows of q, k and v."""
    sizes = heads_of(linear)
    return sizes.key_width, sizes.key_width, sizes.value_width
