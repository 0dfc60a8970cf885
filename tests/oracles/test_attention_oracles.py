"""The softmax mixers against transformers' attention modules with the same weights: fp32 outputs, gradients, decode steps.

Sizes are odd on purpose: heads times head_dim is not the width, groups are of three, sequences of any length.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.model.mixers.attention import Attention, AttentionConfig
from pretrain.model.mixers.cca import CCA, CCAConfig
from pretrain.model.mixers.mla import MLA, MLAConfig
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Mixer

pytest.importorskip("transformers")

WIDTH, HEADS, KV_HEADS, HEAD_DIM, T = 36, 6, 2, 10, 13
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}
Theirs = tuple[nn.Module, nn.Module | None, Any]  # their attention, their rotary embedding, their config


def theirs(family: str, prefix: str, rotary: bool = True, **fields: Any) -> Theirs:
    """Their attention module of one layer, every parameter drawn anew; skips where transformers has no such model."""
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configuration, f"{prefix}Config")(**fields)
    torch.manual_seed(0)
    module = getattr(modeling, f"{prefix}Attention")(config, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3 if parameter.dim() == 1 else 0.0, 0.3)
    return module.eval(), getattr(modeling, f"{prefix}RotaryEmbedding")(config) if rotary else None, config


def run_theirs(
    parts: Theirs, x: torch.Tensor, offset: int = 0, cache: Any = None, window: int | None = None
) -> torch.Tensor:
    module, rotary, config = parts
    end = offset + x.shape[1]
    query, key = torch.arange(offset, end)[:, None], torch.arange(end)[None, :]
    hidden = key > query
    if window is not None:
        overlay = importlib.import_module("transformers.masking_utils").sliding_window_overlay(window)
        hidden = hidden | ~overlay(0, 0, query, key)
    mask = torch.zeros(1, 1, x.shape[1], end).masked_fill(hidden, torch.finfo(torch.float32).min)
    options: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
    if config.model_type == "zaya":
        options["attention_mask"] = {"causal": mask}
        options["position_embeddings"] = rotary(x, torch.arange(offset, end)[None], "hybrid")
    elif config.model_type != "kimi_linear":
        options["position_embeddings"] = None if rotary is None else rotary(x, torch.arange(offset, end)[None])
    return module(x, **options)[0]


def run_ours(mixer: Mixer, x: torch.Tensor, offset: int = 0, cache: dict[str, Any] | None = None) -> torch.Tensor:
    return mixer(x, SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), None, offset), cache)


def assert_equal(mixer: Mixer, parts: Theirs, window: int | None = None) -> None:
    """Outputs, the input's gradient, and a prompt followed by single tokens."""
    x = torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(2))
    results = []
    for run in (lambda x: run_ours(mixer, x), lambda x: run_theirs(parts, x, window=window)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, atol=2e-5, rtol=2e-5)
    cache: dict[str, Any] = {}
    their_cache = importlib.import_module("transformers.cache_utils").DynamicCache(config=parts[2])
    with torch.no_grad():
        for begin, end in [(0, 2), *((t, t + 1) for t in range(2, 8)), (8, 11), (11, 12)]:
            piece = x[:, begin:end]
            ours, other = run_ours(mixer, piece, begin, cache), run_theirs(parts, piece, begin, their_cache, window)
            torch.testing.assert_close(ours, other, atol=2e-5, rtol=2e-5)


def copy(mixer: Mixer, weights: dict[str, torch.Tensor]) -> Mixer:
    mixer.load_state_dict({key: value.detach().clone() for key, value in weights.items()})
    return mixer


def plain_weights(module: Any) -> dict[str, torch.Tensor]:
    """Llama's, Qwen3's and OLMo's names."""
    weights = {
        "qkv.weight": torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]),
        "out.weight": module.o_proj.weight,
    }
    if module.q_proj.bias is not None:
        weights["qkv.bias"] = torch.cat([module.q_proj.bias, module.k_proj.bias, module.v_proj.bias])
        weights["out.bias"] = module.o_proj.bias
    if hasattr(module, "q_norm"):
        weights |= {"q_norm": module.q_norm.weight, "k_norm": module.k_norm.weight}
    return weights


def attention(**options: Any) -> Attention:
    options = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, **options}
    return AttentionConfig.model_validate(options).build(WIDTH)


@pytest.mark.parametrize("bias", [False, True])
def test_llama(bias: bool) -> None:
    parts = theirs("llama", "Llama", attention_bias=bias, **SIZES)
    ours = attention(qk_norm=False, qkv_bias=bias, out_bias=bias)
    assert_equal(copy(ours, plain_weights(parts[0])), parts)


@pytest.mark.parametrize("window", [None, 4])
def test_qwen3_moe(window: int | None) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    parts = theirs("qwen3_moe", "Qwen3Moe", rms_norm_eps=1e-3, rope_parameters=rope, **SIZES)
    ours = attention(norm_eps=1e-3, rope_theta=1e6, window=window)
    assert_equal(copy(ours, plain_weights(parts[0])), parts, window)


def test_qwen2_has_biases_on_the_inputs_only() -> None:
    sizes = {**SIZES, "head_dim": WIDTH // HEADS}
    parts = theirs("qwen2", "Qwen2", **{k: v for k, v in sizes.items() if k != "head_dim"})
    module = parts[0]
    weights = {
        "qkv.weight": torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]),
        "qkv.bias": torch.cat([module.q_proj.bias, module.k_proj.bias, module.v_proj.bias]),
        "out.weight": module.o_proj.weight,
    }
    assert_equal(copy(attention(head_dim=None, qk_norm=False, qkv_bias=True), weights), parts)


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_next(bias: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.4}
    fields = {**SIZES, "layer_types": ["full_attention"]}
    parts = theirs("qwen3_next", "Qwen3Next", rope_parameters=rope, attention_bias=bias, **fields)
    module = parts[0]
    # Their query projection holds, head by head, the query's rows and then the gate's.
    split = lambda t: (part.flatten(0, 1) for part in t.unflatten(0, (HEADS, 2, HEAD_DIM)).unbind(1))  # noqa: E731
    weights = plain_weights(module)
    query, gate = split(module.q_proj.weight)
    weights |= {
        "qkv.weight": torch.cat([query, module.k_proj.weight, module.v_proj.weight]),
        "gate.weight": gate,
    }
    if bias:
        query_bias, gate_bias = split(module.q_proj.bias)
        weights["qkv.bias"] = torch.cat([query_bias, module.k_proj.bias, module.v_proj.bias])
        weights["gate.bias"] = gate_bias
    ours = attention(
        zero_centered_norm=True,
        output_gate=True,
        rope_fraction=0.4,
        rope_theta=1e6,
        qkv_bias=bias,
        out_bias=bias,
    )
    assert ours.rotary_dim == 4
    assert_equal(copy(ours, weights), parts)


@pytest.mark.parametrize("rope", [False, True])
def test_olmo_hybrid(rope: bool) -> None:
    sizes = {**SIZES, "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    parts = theirs("olmo_hybrid", "OlmoHybrid", rotary=rope, rope_parameters=parameters if rope else None, **sizes)
    ours = attention(qk_norm_over="width", rope_fraction=1.0 if rope else 0.0, rope_theta=5e5)
    assert_equal(copy(ours, plain_weights(parts[0])), parts)


def cca_weights(module: Any) -> dict[str, torch.Tensor]:
    projection = module.qkv_proj
    heads, d = HEADS + KV_HEADS, module.head_dim
    names = ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
    return {
        "qkv.weight": torch.cat([getattr(projection, name).weight for name in names]),
        "depthwise": projection.conv_qk_depthwise.weight[:, 0],
        "depthwise_bias": projection.conv_qk_depthwise.bias,
        # Theirs [heads * out, in, tap], ours [heads, tap * in, out].
        "grouped": projection.conv_qk_grouped.weight.unflatten(0, (heads, d)).permute(0, 3, 2, 1).flatten(1, 2),
        "grouped_bias": projection.conv_qk_grouped.bias,
        "temperature": module.qk_norm.temp,
        "out.weight": module.o_proj.weight,
    }


@pytest.mark.parametrize("taps", [(2, 2), (4, 3)])
@pytest.mark.parametrize("window", [None, 4])
def test_zaya(taps: tuple[int, int], window: int | None) -> None:
    rope = {"hybrid": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.4}}
    parts = theirs("zaya", "Zaya", rope_parameters=rope, cca_time0=taps[0], cca_time1=taps[1], **SIZES)
    ours = CCAConfig(
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        depthwise_taps=taps[0],
        grouped_taps=taps[1],
        rope_fraction=0.4,
        rope_theta=1e6,
        window=window,
    ).build(WIDTH)
    assert isinstance(ours, CCA)
    assert_equal(copy(ours, cca_weights(parts[0])), parts, window)


def mla_weights(module: Any) -> dict[str, torch.Tensor]:
    weights = {
        "kv_down.weight": module.kv_a_proj_with_mqa.weight,
        "kv_norm": module.kv_a_layernorm.weight,
        "kv_up.weight": module.kv_b_proj.weight,
        "out.weight": module.o_proj.weight,
    }
    if module.q_proj is not None:
        return weights | {"query.weight": module.q_proj.weight}
    return weights | {
        "query_down.weight": module.q_a_proj.weight,
        "query_norm": module.q_a_layernorm.weight,
        "query.weight": module.q_b_proj.weight,
    }


LATENT = {"kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LATENT_SIZES = {**{k: v for k, v in SIZES.items() if k != "head_dim"}, "num_key_value_heads": HEADS, **LATENT}


def mla(**options: Any) -> MLA:
    config = {"heads": HEADS, "kv_rank": 14, "head_dim": 6, "shared_dim": 4, "value_dim": 5, **options}
    return MLAConfig.model_validate(config).build(WIDTH)


@pytest.mark.parametrize("query_rank", [None, 9])
def test_kimi_linear(query_rank: int | None) -> None:
    fields = {**LATENT_SIZES, "layer_types": ["full_attention"], "q_lora_rank": query_rank, "rms_norm_eps": 1e-2}
    parts = theirs("kimi_linear", "KimiLinear", rotary=False, **fields)
    # Their latents' norms keep an eps of 1e-6 whatever rms_norm_eps says.
    assert_equal(copy(mla(query_rank=query_rank), mla_weights(parts[0])), parts)


@pytest.mark.parametrize("interleave", [False, True])
def test_deepseek_v3(interleave: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    fields = {**LATENT_SIZES, "q_lora_rank": 9, "rope_parameters": rope, "rope_interleave": interleave}
    parts = theirs("deepseek_v3", "DeepseekV3", **fields)
    weights = mla_weights(parts[0])
    if interleave:
        # Pairs of neighbours in theirs, of halves in ours: even channels first, then odd ones, in queries and shared key.
        order = torch.cat([torch.arange(6), 6 + torch.tensor([0, 2, 1, 3])])
        weights["query.weight"] = weights["query.weight"].unflatten(0, (HEADS, 10))[:, order].flatten(0, 1)
        order = torch.cat([torch.arange(14), 14 + torch.tensor([0, 2, 1, 3])])
        weights["kv_down.weight"] = weights["kv_down.weight"][order]
    assert_equal(copy(mla(query_rank=9, rope=True, rope_theta=1e6), weights), parts)
