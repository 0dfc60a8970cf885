"""Folders that transformers reads and writes: the same logits there and here, in both directions, also token by token.

Sizes are odd on purpose: groups of heads, heads whose channels are not the width, rows that are no multiple of a chunk, layers of
mixed kinds. Agreement is that of two fp32 programs that sum in another order.
"""

from __future__ import annotations

import importlib
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from launch.step_bench.models import torch_forms
from parallel.state import model_tensors
from pretrain.checkpoint import storage
from pretrain.checkpoint.interop import FORMATS
from pretrain.checkpoint.interop.export import export
from pretrain.checkpoint.interop.intake import intake
from pretrain.checkpoint.interop.source import model_config, newest
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.vocabulary import train as train_tokenizer
from pretrain.loading import load
from pretrain.model.decoder import Decoder, DecoderConfig
from tests.ranks import ROOT

transformers = pytest.importorskip("transformers")

TOLERANCE = 3e-5
VOCABULARY, WIDTH, T, STEPS = 37, 18, 71, 4
EPS = 1e-2  # large enough that a norm with another one shows

ATTENTION = {"kind": "attention", "heads": 3, "kv_heads": 1, "head_dim": 10}
GDN = {"kind": "gated_delta_net", "heads": 2, "value_heads": 6, "head_dim": 11, "value_dim": 7, "conv_width": 3}
SWIGLU = {"kind": "swiglu", "hidden": 20}
MOE = {"kind": "moe", "experts": 5, "top_k": 2, "hidden": 11, "gate": "softmax", "bias_rate": 0.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "mixers": {"a": {**ATTENTION, "qk_norm": False, "rope_theta": 5e4}},
            "ffns": {"f": SWIGLU},
            "layers": ["a + f x3"],
        },
    ),
    "llama tied, biases": (
        "llama",
        {
            "mixers": {
                "a": {"kind": "attention", "heads": 3, "head_dim": 6, "qk_norm": False, "qkv_bias": True, "out_bias": True}
            },
            "ffns": {"f": SWIGLU},
            "layers": ["a + f x2"],
            "tie_embeddings": True,
            "norm_eps": EPS,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "mixers": {"a": {**ATTENTION, "norm_eps": EPS}},
            "ffns": {"f": SWIGLU, "m": MOE},
            "layers": ["a + f", "a + m x2"],
            "norm_eps": EPS,
        },
    ),
    "qwen3_moe window, not normalised": (
        "qwen3_moe",
        {
            "mixers": {"a": {**ATTENTION, "window": 9, "qkv_bias": True, "out_bias": True}},
            "ffns": {"m": {**MOE, "normalize": False}},
            "layers": ["a + m x2"],
            "tie_embeddings": True,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "mixers": {
                "a": {
                    **ATTENTION, "zero_centered_norm": True, "output_gate": True, "rope_fraction": 0.4, "norm_eps": EPS,
                },
                "g": {**GDN, "norm_eps": EPS},
            },
            "ffns": {"f": SWIGLU, "m": {**MOE, "shared_hidden": 9, "shared_gate": True}},
            "layers": ["g + m x2", "a + m", "g + f"],
            "block": {"zero_centered_norms": True},
            "norm_eps": EPS,
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            "mixers": {
                "a": {**ATTENTION, "qk_norm_over": "width", "rope_fraction": 0.0, "norm_eps": EPS},
                "g": {**GDN, "negative_eigenvalues": True, "norm_eps": 1e-5},
            },
            "ffns": {"f": SWIGLU},
            "layers": ["g + f x2", "a + f"],
            "block": {"norm_of": {"a": "post"}},
            "norm_eps": EPS,
        },
    ),
    "olmo_hybrid with positions": (
        "olmo_hybrid",
        {
            "mixers": {
                "a": {**ATTENTION, "qk_norm_over": "width", "rope_theta": 5e5, "norm_eps": EPS},
                "g": {**GDN, "norm_eps": 1e-5},
            },
            "ffns": {"f": SWIGLU},
            "layers": ["g + f", "a + f"],
            "repeat": 2,
            "block": {"norm_of": {"a": "post"}},
            "norm_eps": EPS,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            "mixers": {
                "k": {"kind": "kda", "heads": 3, "head_dim": 5, "conv_width": 3, "norm_eps": EPS},
                "m": {"kind": "mla", "heads": 3, "kv_rank": 7, "head_dim": 6, "shared_dim": 4, "value_dim": 5},
            },
            "ffns": {
                "f": SWIGLU,
                "e": {
                    "kind": "moe", "experts": 8, "top_k": 3, "hidden": 11, "shared_hidden": 22, "route_scale": 2.4,
                    "groups": 4, "top_groups": 2,
                },
            },
            "layers": ["k + f", "k + e", "m + e", "m + f"],
            "norm_eps": EPS,
        },
    ),
    "kimi_linear with a query rank": (
        "kimi_linear",
        {
            "mixers": {
                "k": {"kind": "kda", "heads": 3, "head_dim": 5, "norm_eps": EPS},
                "m": {"kind": "mla", "heads": 2, "kv_rank": 7, "query_rank": 9, "head_dim": 6, "shared_dim": 4},
            },
            "ffns": {"f": SWIGLU},
            "layers": ["k + f", "m + f"],
            "norm_eps": EPS,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "mixers": {"s": {"kind": "mamba2", "head_dim": 3, "state_dim": 5, "groups": 3, "conv_width": 3, "norm_eps": EPS}},
            "layers": ["s x3"],
            "norm_eps": EPS,
        },
    ),
    "mamba2 biases": (
        "mamba2",
        {
            "mixers": {
                "s": {
                    "kind": "mamba2", "expand": 3, "head_dim": 6, "state_dim": 5, "bias": True, "conv_bias": False,
                    "norm_eps": EPS,
                }
            },
            "layers": ["s x2"],
            "norm_eps": EPS,
            "tie_embeddings": True,
        },
    ),
    "zaya": (
        "zaya",
        {
            "mixers": {
                "c": {"kind": "cca", "heads": 6, "kv_heads": 2, "head_dim": 10, "rope_fraction": 0.4},
                "w": {
                    "kind": "cca", "heads": 6, "kv_heads": 2, "head_dim": 10, "rope_fraction": 0.8, "rope_theta": 1e3,
                    "window": 9,
                },
            },
            "ffns": {"z": {"kind": "zaya_moe", "experts": 3, "hidden": 11, "router_width": 9, "skip": "zero", "norm_eps": EPS}},
            "layers": ["c + z", "w + z", "c + z"],
            "block": {"residual_scaling": True},
            "norm_eps": EPS,
            "tie_embeddings": True,
        },
    ),
    "zaya taps": (
        "zaya",
        {
            "mixers": {
                "c": {
                    "kind": "cca", "heads": 3, "kv_heads": 1, "head_dim": 6, "rope_fraction": 1.0,
                    "depthwise_taps": 4, "grouped_taps": 3,
                }
            },
            "ffns": {"z": {"kind": "zaya_moe", "experts": 4, "hidden": 11, "router_width": 9, "skip": "zero", "norm_eps": EPS}},
            "layers": ["c + z x2"],
            "block": {"residual_scaling": True},
            "norm_eps": EPS,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls the GPU kernels of packages that are installed; its own torch forms run on a CPU."""
    for name in ("qwen3_next", "olmo_hybrid", "kimi_linear", "mamba2"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for key, function in torch_forms(module).items():
            monkeypatch.setattr(module, key, function)


def config(case: str) -> DecoderConfig:
    defaults = {"vocabulary": VOCABULARY, "width": WIDTH, "tie_embeddings": False}
    return DecoderConfig.model_validate({**defaults, **CASES[case][1]})


@torch.no_grad()
def shaken(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Random values everywhere: what keeps its default (ones, zeros) would hide what is not copied."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point() or name.endswith(("bias_mean", "bias_square")):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        scale = name.endswith(("norm", "norm.weight", "layernorm.weight", "_scale", ".D", "temperature", "temp"))
        size = 0.2 if tensor.dim() > 1 else 0.3
        tensor.copy_(noise * 0.3 + 1.0 if scale else noise * size)


def save(decoder: Decoder, run: Path, **meta: Any) -> Path:
    section = {"model": decoder.config.model_dump(mode="json")}
    Checkpoints(run / "checkpoints").save(7, model_tensors(decoder), {"step": 7, "config": section, **meta})
    return run


def our_run(case: str, run: Path) -> Decoder:
    decoder = Decoder(config(case)).eval()
    shaken(model_tensors(decoder))
    if CASES[case][0].startswith("qwen3"):
        for router in decoder.routers().values():
            router.bias.zero_()  # type: ignore[operator]
    save(decoder, run)
    return decoder


def their_model(folder: Path) -> Any:
    """The folder as AutoModelForCausalLM would load it."""
    name = json.loads((folder / "config.json").read_text())["model_type"]
    # Not through AutoModelForCausalLM itself: flash-linear-attention, once imported, puts models of its own in there.
    architecture = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[
        name
    ]
    # The grouped product of the experts' other forms wants sizes that are multiples of 16 bytes.
    options = {"output_loading_info": True, "experts_implementation": "eager"}
    model, report = getattr(transformers, architecture).from_pretrained(folder, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    if name == "zaya":  # as an export notes: the class sets the bias of the skip choice to -1 after it has loaded it
        read, _ = contents(folder)
        for number, layer in enumerate(model.model.layers):
            assert layer.mlp.gate.balancing_biases[-1] == -1.0
            layer.mlp.gate.balancing_biases.copy_(read[f"model.layers.{number}.mlp.gate.balancing_biases"])
    return model.eval()


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def their_logits(model: Any) -> Iterator[Tensor]:
    """Of whole rows; then of a prompt and of single tokens after it, with a cache."""
    ids = tokens()
    yield model(ids).logits
    cache = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    state: dict[str, Any] = {}
    for start, end in pieces():
        out = model(ids[:, start:end], use_cache=True, **state)
        state = {cache: out[cache]}
        yield out.logits


@torch.no_grad()
def our_logits(model: Decoder) -> Iterator[Tensor]:
    ids, cache = tokens(), model.new_cache()
    yield model(ids)
    for start, end in pieces():
        yield model(ids[:, start:end], cache=cache)


def pieces() -> list[tuple[int, int]]:
    prompt = T - STEPS
    return [(0, prompt), *((t, t + 1) for t in range(prompt, T))]


def assert_same(ours: Decoder, theirs: Any) -> float:
    worst = 0.0
    for mine, other in zip(our_logits(ours), their_logits(theirs), strict=True):
        assert mine.shape == other.shape
        worst = max(worst, ((mine - other).abs().max() / other.abs().max()).item())
    assert worst < TOLERANCE, f"relative difference {worst:.2e}"
    return worst


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_out_and_back(case: str, tmp_path: Path) -> None:
    ours = our_run(case, tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out", limit=20_000)
    assert done.form.name == CASES[case][0]
    worst = assert_same(ours, their_model(tmp_path / "out"))
    print(f"{case}: {worst:.1e}")
    intake(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out again", CASES[case][0])
    (first, first_config), (second, second_config) = contents(tmp_path / "out"), contents(tmp_path / "out again")
    assert first_config == second_config and first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 11, "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 11, "num_experts": 5, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 5e4}
THEIRS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 10, "rope_parameters": ROPE, "attention_bias": True, "rms_norm_eps": EPS},
    "qwen3_moe": {**EXPERTS, "head_dim": 10, "decoder_sparse_step": 2, "rms_norm_eps": EPS, "norm_topk_prob": True},
    "qwen3_next": {**EXPERTS, **LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 9, "mlp_only_layers": [1]},
    "olmo_hybrid": {**LINEAR, "rms_norm_eps": EPS, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    "kimi_linear": {
        "num_key_value_heads": 3, "kv_lora_rank": 7, "q_lora_rank": 9, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 5, "linear_head_dim": 5, "linear_num_heads": 3, "moe_intermediate_size": 11, "num_local_experts": 6,
        "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "n_shared_experts": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "mamba2": {"head_dim": 3, "num_heads": 12, "state_size": 5, "n_groups": 3, "conv_kernel": 3, "use_bias": True},
    "zaya": {
        "head_dim": 10, "moe_intermediate_size": 11, "num_experts": 3, "router_hidden_size": 9, "sliding_window": 9,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "rope_parameters": {
            "hybrid": {**ROPE, "partial_rotary_factor": 0.4}, "hybrid_sliding": {**ROPE, "partial_rotary_factor": 0.8},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_of_theirs(name: str, tmp_path: Path) -> None:
    auto = importlib.import_module("transformers.models.auto")
    unknown = {
        "mamba2": ("intermediate_size", "num_attention_heads", "num_key_value_heads"),
        "zaya": ("intermediate_size",),
    }
    sizes = {key: value for key, value in SIZES.items() if key not in unknown.get(name, ())}
    settings = getattr(transformers, auto.configuration_auto.CONFIG_MAPPING_NAMES[name])(**{**sizes, **THEIRS[name]})
    model = getattr(transformers, auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(settings).eval()
    shaken(dict(model.state_dict()), seed=1)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    done = intake(tmp_path / "theirs", tmp_path / "ours")
    assert done.form.name == name
    assert done.notes == [
        "the folder has neither tokenizer.json nor tokenizer.model: the imported model has no tokenizer"
    ]
    ours = Decoder(model_config(newest(tmp_path / "ours"))).eval()
    storage.read(done.checkpoint, model_tensors(ours))
    print(f"{name}: {assert_same(ours, model):.1e}")
    export(tmp_path / "ours", tmp_path / "again", name)
    again = their_model(tmp_path / "again")
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, again.state_dict()[n])] == []


def test_bf16(tmp_path: Path) -> None:
    """Weights are rounded once; what decides or decays stays fp32; and a second round trip changes no bit."""
    ours = our_run("kimi_linear", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", dtype="bf16")
    found, settings = contents(tmp_path / "out")
    assert settings["dtype"] == "bfloat16"
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in wide} == {"A_log", "dt_bias", "e_score_correction_bias"}
    assert torch.equal(found["lm_head.weight"], ours.state_dict()["head.weight"].bfloat16())
    intake(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out again", dtype="bf16")
    second, _ = contents(tmp_path / "out again")
    assert found.keys() == second.keys() and all(torch.equal(found[name], second[name]) for name in found)


def test_auto_tokenizer(tmp_path: Path) -> None:
    """AutoTokenizer, on an exported folder of every kind of model, encodes as the run's own tokenizer does."""
    decoder = Decoder(DecoderConfig.model_validate({**config("llama").model_dump(), "vocabulary": 512}))
    run = save(decoder, tmp_path / "run")
    sources = [path.read_text() for path in sorted((ROOT / "pretrain").glob("*/*.py"))]
    train_tokenizer(sources, 512, run / "tokenizer.model")
    assert export(run, tmp_path / "out").notes == []
    ours, names = Tokenizer(run / "tokenizer.model"), json.loads((tmp_path / "out/config.json").read_text())
    assert (names["bos_token_id"], names["eos_token_id"]) == (ours.bos, ours.eos)
    draw = random.Random(0)
    alphabet = [*"abc<>s/0x41_u()=.,:'", *" \n" * 4, "\t", "\r", "⁇", "é", "漢", "🎉", "self", "return ", "    "]
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(300)]
    texts += sources[:5]
    texts += ["</s> <s> <unk>", "\n        x\n\n    y  ", "naïve 数学 🙂", ""]
    for model_type in FORMATS:
        (tmp_path / "out/config.json").write_text(json.dumps({**names, "model_type": model_type}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        for text in texts if model_type == "llama" else texts[-8:]:
            ids = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs(text)["input_ids"] == [ours.bos, *ids]
            assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)


def test_a_tokenizer_of_theirs(tmp_path: Path) -> None:
    """A byte-level tokenizer.json travels in and out as it is, and reads text as transformers reads it."""
    import tokenizers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([path.read_text() for path in (ROOT / "pretrain/checkpoint").glob("*.py")], trainer)
    decoder = Decoder(DecoderConfig.model_validate({**config("llama").model_dump(), "vocabulary": 320}))
    export(save(decoder, tmp_path / "run"), tmp_path / "theirs")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    theirs.save_pretrained(tmp_path / "theirs")
    assert intake(tmp_path / "theirs", tmp_path / "ours").notes == []
    _, ours = load(tmp_path / "ours")
    text = "def f(x):\n    return 'naïve 数学 🙂'  # \u2581\n<|endoftext|>"
    ids = ours.encode(text)
    assert ours.eos == ours.bos == theirs.eos_token_id and ours.eos not in ids
    assert ids[:-20] == theirs.encode(text)[: len(ids) - 20]
    assert ours.decode(ids) == text and int(ours.token_bytes[ids].sum()) == len(text.encode())
    assert ours.token_bytes[ours.eos] == 0 and ours.piece(ours.eos) == "<|endoftext|>"
    assert pickle.loads(pickle.dumps(ours)).encode(text) == ids
    export(tmp_path / "ours", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        first, second = (tmp_path / "theirs" / name).read_bytes(), (tmp_path / "again" / name).read_bytes()
        assert (first == second) == (name != "config.json")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == ours.eos
