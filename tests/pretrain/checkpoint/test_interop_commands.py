"""Export and import on the command line, and what they refuse. transformers is not needed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from parallel.state import model_tensors
from pretrain import load
from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.interop import FORMATS, shards, vocabulary
from pretrain.checkpoint.interop.form import choose, find, model_of, obstacles
from pretrain.checkpoint.interop.theirs import Theirs
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.data.errors import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.vocabulary import train as train_tokenizer
from pretrain.evaluate.__main__ import main as evaluate
from pretrain.generate import main as generate
from pretrain.model.decoder import Decoder, DecoderConfig
from tests.ranks import ROOT

LLAMA: dict[str, Any] = {
    "vocabulary": 512,
    "width": 24,
    "mixers": {"a": {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": False}},
    "ffns": {"f": {"kind": "swiglu", "hidden": 28}},
    "layers": ["a + f x3"],
}
MIXED: dict[str, Any] = {
    **LLAMA,
    "mixers": {**LLAMA["mixers"], "g": {"kind": "gated_delta_net", "heads": 2, "head_dim": 8}},
    "ffns": {"h": {"kind": "hourglass", "hidden": 8, "depth": 2}},
    "layers": ["g + h", "a + h"],
}


def run_of(folder: Path, model: dict[str, Any], change: Callable[[Decoder], None] | None = None) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.model_validate(model))
    if change is not None:
        change(decoder)
    data = {"path": "nowhere", "sequence_length": 48}
    section = {
        "model": decoder.config.model_dump(mode="json"),
        "run": "x",
        "data": data,
        "train": {"steps": 3, "batch": 1},
    }
    meta = {"step": 3, "tokens": 9, "config": section}
    optimizer = {"optimizer/embedding.weight/step": torch.zeros(())}
    Checkpoints(folder / "checkpoints").save(3, model_tensors(decoder) | optimizer, meta)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([file.read_text() for file in sorted((ROOT / "pretrain").glob("*/*.py"))], 512, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported Llama in three files."""
    run = run_of(tmp_path / "run", LLAMA)
    assert main(["export", str(run), "--out", str(tmp_path / "llama"), "--shard-size", "40KiB"]) == 0
    return tmp_path / "llama"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(part) for part in arguments]) == code
    return capsys.readouterr().err


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


# Out and in ----------------------------------------------------------------------------------------------------------


def test_an_imported_folder_is_used_like_a_run(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", LLAMA)
    shutil.copyfile(tokenizer, run / "tokenizer.model")
    out, back, text = tmp_path / "out", tmp_path / "back", tmp_path / "text.txt"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert f"{out}: step_00000003 as LlamaForCausalLM (llama)" in capsys.readouterr().out
    settings = json.loads((out / "config.json").read_text())
    assert (
        settings["max_position_embeddings"] == 48
        and settings["vocab_size"] == 512
        and settings["num_hidden_layers"] == 3
    )
    assert main(["import", str(out), "--out", str(back)]) == 0
    assert capsys.readouterr().err == ""
    for command in ("list", "verify", "inspect"):
        assert main([command, str(back)]) == 0
    assert "good" in capsys.readouterr().out
    (ours, words), (theirs, same_words) = load(run / "checkpoints/step_00000003"), load(back)
    assert same_words.encode("def f():\n  ") == words.encode("def f():\n  ")
    ids = torch.tensor([words.encode("import re\n")])
    assert torch.equal(ours(ids), theirs(ids))
    assert generate(["--checkpoint", str(back), "--prompt", "def", "--tokens", "4", "--temperature", "0"]) == 0
    text.write_text("import sys\n" * 20)
    assert evaluate(["--checkpoint", str(back), "--tasks", "perplexity", "--text", str(text)]) == 0
    section = yaml.safe_load((back / "config.yaml").read_text())
    assert section["model"]["layers"] == ["attention + swiglu x3"]
    # And out again, to the same bytes.
    assert main(["export", str(back), "--out", str(tmp_path / "again"), "--format", "llama"]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert [p.name for p in out.iterdir() if p.read_bytes() != (tmp_path / "again" / p.name).read_bytes()] == []


def test_transformers_is_not_needed(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", LLAMA)
    program = (
        "import sys; sys.modules['transformers'] = None\nfrom pretrain.checkpoint.__main__ import main\n"
        f"assert main(['export', {str(run)!r}, '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        f"assert main(['import', {str(tmp_path / 'out')!r}, '--out', {str(tmp_path / 'back')!r}]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_shards(folder: Path) -> None:
    index = json.loads((folder / shards.INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {name: sum(tensor.nbytes for tensor in load_file(folder / name).values()) for name in files}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= 40 << 10 or len(load_file(folder / name)) == 1 for name, size in sizes.items())
    for name in files:
        assert (folder / name).stat().st_mode == (folder / "config.json").stat().st_mode
        assert all(index["weight_map"][key] == name for key in load_file(folder / name))


def test_a_failed_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", LLAMA)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        main(["export", str(run), "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# What a format cannot express ----------------------------------------------------------------------------------------


def test_auto_says_for_each_format_what_stands_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", MIXED)
    text = refused(capsys, "export", run, "--out", tmp_path / "out")
    assert text.startswith("error: no format can express this model:\n")
    lines = dict(line.strip().split(": ", 1) for line in text.splitlines()[1:])
    assert list(lines) == list(FORMATS)
    assert lines["llama"].startswith("model.mixers.g.kind = gated_delta_net: Llama has attention (and ")
    assert lines["mamba2"].startswith("model.mixers.g.kind = gated_delta_net: Mamba-2 has mamba2 (and ")
    assert lines["olmo_hybrid"] == "model.ffns.h.kind = hourglass: OLMo Hybrid has swiglu"
    assert not (tmp_path / "out").exists()


A = {"kind": "attention", "heads": 4, "qk_norm": False}


@pytest.mark.parametrize(
    ("form", "change", "line"),
    [
        ("llama", {"block": {"norm": "peri"}}, "model.block.norm = peri (layers with a): Llama has pre"),
        ("llama", {"block": {"parallel": True}}, "model.block.parallel = true: Llama has false"),
        ("llama", {"block": {"zero_centered_norms": True}}, "model.block.zero_centered_norms = true: Llama has false"),
        ("llama", {"multi_token": {"layer": "a + f"}}, "model.multi_token = {...}: Llama has null"),
        ("llama", {"mixers": {"a": {**A, "window": 5}}}, "model.mixers.a.window = 5: Llama has null"),
        ("llama", {"mixers": {"a": {**A, "qk_norm": True}}}, "model.mixers.a.qk_norm = true: Llama has false"),
        ("llama", {"mixers": {"a": {**A, "qkv_bias": True}}}, "model.mixers.a.out_bias = false: Llama has true"),
        ("llama", {"mixers": {"a": {**A, "rope_fraction": 0.5}}}, "model.mixers.a.rope_fraction = 0.333"),
        ("llama", {"mixers": {"a": {**A, "scale": 0.3}}}, "model.mixers.a.scale = 0.3: Llama has null"),
        (
            "llama",
            {"mixers": {"a": A, "b": {**A, "rope_theta": 7.0}}, "layers": ["a + f", "b + f"]},
            "model.mixers.b.rope_theta = 7.0: Llama has 10000.0",
        ),
        ("llama", {"layers": ["a + f", "a"]}, "model.layers has a without a FFN: Llama's layers have swiglu"),
        (
            "llama",
            {"width": 26, "mixers": {"a": {**A, "head_dim": 6}}},
            "model.mixers.*.heads = 4: Llama's configuration insists on a divisor of width = 26",
        ),
        ("qwen3_moe", {}, "model.mixers.a.qk_norm = false: Qwen3-MoE has true"),
        (
            "qwen3_moe",
            {"ffns": {"f": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 8}}},
            "model.ffns.f.shared_hidden = 8: Qwen3-MoE has 0",
        ),
        (
            "kimi_linear",
            {
                "mixers": {"a": {"kind": "kda", "heads": 2, "head_dim": 8, "safe_gate": True}},
                "ffns": {"f": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 12}},
            },
            "model.ffns.f.shared_hidden = 12: Kimi Linear has 8",
        ),
        (
            "mamba2",
            {"mixers": {"a": {"kind": "mamba2", "expand": 1.5, "head_dim": 6}}, "layers": ["a"]},
            "model.mixers.*.expand = 1.5: Mamba-2's configuration has whole numbers",
        ),
        (
            "zaya",
            {
                "mixers": {"a": {"kind": "cca", "heads": 2, "head_dim": 6, "rope_fraction": 0.5}},
                "ffns": {"f": {"kind": "zaya_moe", "experts": 3, "hidden": 8, "skip": "identity"}},
                "block": {"residual_scaling": True},
            },
            "model.ffns.f.skip = identity: ZAYA1 has zero",
        ),
        (
            "zaya",
            {
                "mixers": {"a": {"kind": "cca", "heads": 2, "head_dim": 6, "rope_fraction": 0.5}},
                "ffns": {"f": {"kind": "zaya_moe", "experts": 3, "hidden": 8, "skip": "zero"}},
            },
            "model.mixers.a.rope_fraction = 0.5: an odd number of channels, 3",
        ),
    ],
)
def test_obstacles(form: str, change: dict[str, Any], line: str) -> None:
    found = obstacles(find(form), DecoderConfig.model_validate({**LLAMA, **change}))
    assert any(one.startswith(line) for one in found), found


def test_what_only_training_needs_is_no_obstacle() -> None:
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "gate": "softmax", "z_loss": 0.1, "bias_rate": 0.0}
    changes = {"mixers": {"a": {**A, "qk_norm": True}}, "ffns": {"f": moe}, "init_std": 0.1}
    assert choose("auto", DecoderConfig.model_validate({**LLAMA, **changes})).name == "qwen3_moe"


@pytest.mark.parametrize(
    ("file", "name", "change"),
    [
        ("transformer_340m", "llama", {}),
        ("qwen3_next_80b", "qwen3_next", {}),
        ("kimi_linear_48b", "kimi_linear", {}),
        ("zaya1_8b", "zaya", {"skip": "zero"}),
    ],
)
def test_the_released_models_have_formats(file: str, name: str, change: dict[str, Any]) -> None:
    model = yaml.safe_load((ROOT / f"configs/models/{file}.yaml").read_text())["model"]
    for ffn in model["ffns"].values():
        ffn |= change
    config = DecoderConfig.model_validate({**model, "vocabulary": 64})
    if file == "zaya1_8b":
        # The file leaves out the router's eps, 1e-5 there and here.
        assert config.ffns["moe"].model_dump()["norm_eps"] == config.norm_eps
    assert choose("auto", config).name == name


def test_a_balancing_bias_is_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "gate": "softmax"}
    model = {**LLAMA, "mixers": {"a": {**A, "qk_norm": True}}, "ffns": {"f": moe}}

    def move(decoder: Decoder) -> None:
        decoder.get_buffer("blocks.1.ffn.router.bias")[2] = 1e-3

    text = refused(capsys, "export", run_of(tmp_path / "moved", model, move), "--out", tmp_path / "out")
    assert "blocks.1.ffn.router.bias is not 0 everywhere: there is no balancing bias" in text
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run_of(tmp_path / "still", model)), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("name", "near"), [("lama", "llama"), ("qwen3_nxt", "qwen3_next"), ("mamba", "mamba2")])
def test_an_unknown_format_guesses(name: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", LLAMA)
    text = refused(capsys, "export", run, "--out", tmp_path / "out", "--format", name)
    assert f"{name!r} is no known format; did you mean {near!r}? formats: {', '.join(FORMATS)}" in text


# Folders that are not right ------------------------------------------------------------------------------------------


def test_paths(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert "exists and is not empty" in refused(capsys, "export", run, "--out", folder)
    assert "exists and is not empty" in refused(capsys, "import", folder, "--out", run)
    assert "no such folder" in refused(capsys, "export", tmp_path / "nothing", "--out", tmp_path / "out")
    assert "no such folder" in refused(capsys, "import", tmp_path / "nothing", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no checkpoints yet" in refused(capsys, "export", tmp_path / "empty", "--out", tmp_path / "out")
    assert "has no config.json" in refused(capsys, "import", tmp_path / "empty", "--out", tmp_path / "out")
    assert main(["import", str(folder), "--out", str(tmp_path / "empty")]) == 0  # an empty folder will do


def test_files_missing_or_damaged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, second = tmp_path / "out", sorted(folder.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert f"{second} is damaged" in refused(capsys, "import", folder, "--out", out, code=1)
    second.write_bytes(b"\xff" * 64 + whole[64:])
    assert f"{second} is damaged" in refused(capsys, "import", folder, "--out", out, code=1)
    save_file(dict(list(load_file_of(whole, tmp_path).items())[1:]), second)
    assert f"{second} does not hold" in refused(capsys, "import", folder, "--out", out, code=1)
    second.unlink()
    text = refused(capsys, "import", folder, "--out", out, code=1)
    assert f"{second} is missing; {shards.INDEX} lists it" in text
    (folder / shards.INDEX).write_text('{"weight_map": 3}')
    assert "cannot be read" in refused(capsys, "import", folder, "--out", out, code=1)
    (folder / shards.INDEX).unlink()
    (folder / "pytorch_model.bin").touch()
    assert "convert pytorch_model.bin to safetensors first" in refused(capsys, "import", folder, "--out", out)
    assert [path.name for path in tmp_path.glob("*out*")] == []


def load_file_of(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole").write_bytes(content)
    return load_file(folder / "whole")


def test_tensors_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder, out = run_of(tmp_path / "run", LLAMA), tmp_path / "llama", tmp_path / "out"
    assert main(["export", str(run), "--out", str(folder)]) == 0
    file = folder / shards.SINGLE
    tensors = load_file(file)
    q = "model.layers.1.self_attn.q_proj.weight"

    def trial(**changes: torch.Tensor | None) -> str:
        found = {name: t for name, t in (tensors | changes).items() if t is not None}
        save_file(found, file)
        return refused(capsys, "import", folder, "--out", out)

    assert f"does not fit its config.json:\n  missing: {q}" in trial(**{q: None})
    assert f"{q} is [24, 25], and should be [24, 24]" in trial(**{q: torch.ones(24, 25)})
    assert "holds model.layers.9.x, which its config.json does not account for" in trial(
        **{"model.layers.9.x": torch.ones(1)}
    )
    assert "quantised weights cannot be imported" in trial(**{q: torch.ones(24, 24, dtype=torch.int8)})
    # The head is tied: a second copy will do, another tensor will not.
    embedding = tensors["model.embed_tokens.weight"]
    assert "ties the head to the embedding" in trial(**{"lm_head.weight": embedding + 1})
    save_file({**tensors, "lm_head.weight": embedding.clone(), "model.rotary_emb.inv_freq": torch.ones(3)}, file)
    assert main(["import", str(folder), "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "llamma"}, "model_type = llamma: no known format; did you mean 'llama'?"),
        ({"model_type": "absent"}, "model_type is missing"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu: only silu can be expressed here"),
        ({"mlp_bias": True}, "mlp_bias = true: only false can be expressed here"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {...}: only null can be expressed here"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type = yarn: only default"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type = linear: only default",
        ),
        ({"num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"vocab_size": 0}, "vocabulary: Input should be greater than or equal to 1"),
    ],
)
def test_configurations_that_cannot_be_expressed(
    changes: dict[str, Any], line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "config.json", **changes)
    assert line in refused(capsys, "import", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unread_keys_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "config.json", embedding_multiplier=3.0, some_flag=False, router_aux_loss_coef=0.1)
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert "config.json: embedding_multiplier was not used" in err and "some_flag" not in err and "router" not in err


def test_how_older_and_released_folders_say_it() -> None:
    old = {
        "vocab_size": 64,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 28,
        "num_hidden_layers": 8,
    }
    llama = model_of(find("llama"), Theirs({**old, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}))
    mixer = llama.mixers["attention"].model_dump()
    assert (mixer["rope_theta"], mixer["kv_heads"], mixer["head_dim"], llama.norm_eps) == (5e5, 4, 6, 1e-5)
    assert not llama.tie_embeddings and llama.layers == ["attention + swiglu x8"]
    next_ = {
        **old,
        "full_attention_interval": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
    found = model_of(
        find("qwen3_next"), Theirs({**next_, "partial_rotary_factor": 0.5, "rope_theta": 1e7, "head_dim": 8})
    )
    assert (found.layers, found.repeat) == (["gdn + moe x3", "attention + moe"], 2)
    assert found.mixers["attention"].model_dump()["rope_fraction"] == 0.5
    own = {
        "num_heads": 3, "head_dim": 8, "short_conv_kernel_size": 3, "full_attn_layers": [4, 8],
        "kda_layers": [1, 2, 3, 5, 6, 7],
    }  # fmt: skip
    kimi = {**old, "linear_attn_config": own, "first_k_dense_replace": 1, "num_experts": 8, "moe_intermediate_size": 8}
    found = model_of(find("kimi_linear"), Theirs(kimi))
    assert [str(layer) for layer in found.pattern()] == [
        f"{'mla' if i in (3, 7) else 'kda'} + {'moe' if i else 'swiglu'}" for i in range(8)
    ]
    assert found.mixers["kda"].model_dump()["conv_width"] == 3
    infinite = {"time_step_limit": [0.0, float("inf")], "num_heads": 6, "head_dim": 8, "n_groups": 1}
    mamba = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, **infinite}
    assert model_of(find("mamba2"), Theirs(mamba)).mixers["mamba"].model_dump()["dt_limits"] is None
    limited = {**mamba, "time_step_limit": [0.1, {"__float__": "Infinity"}]}
    assert model_of(find("mamba2"), Theirs(limited)).mixers["mamba"].model_dump()["dt_limits"] == (0.1, float("inf"))
    with pytest.raises(ValueError, match="num_heads = 5 of 8 channels are not the 48 inner ones"):
        model_of(find("mamba2"), Theirs({**mamba, "num_heads": 5}))


# Tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "identity", "byte_fallback": True}])
def test_foreign_sentencepiece_models(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """SentencePiece's own defaults normalise, and put a space before each text."""
    import io

    import sentencepiece

    texts, model = [file.read_text() for file in sorted((ROOT / "pretrain").glob("*/*.py"))[:40]], io.BytesIO()
    lines = iter([line for text in texts for line in text.splitlines()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=420, model_type=kind, minloglevel=2, **options
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    translated, _ = vocabulary.translate(path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(translated))
    ours, theirs = Tokenizer(path), Tokenizer(tmp_path / "tokenizer.json")
    assert vocabulary.disagreement(ours, tmp_path / "tokenizer.json") is None
    for text in texts[0].splitlines():
        assert ours.encode(text) == theirs.encode(text)
    assert ours.vocabulary_size == theirs.vocabulary_size and ours.bos == theirs.bos and ours.eos == theirs.eos
    assert (ours.token_bytes == theirs.token_bytes).all()
    assert [ours.piece(i) for i in range(300)] == [theirs.piece(i) for i in range(300)]


def test_a_translation_that_would_differ_is_not_written(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", LLAMA)
    shutil.copyfile(tokenizer, run / "tokenizer.model")
    monkeypatch.setattr(vocabulary, "_merges", lambda scores: [])
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "no tokenizer.json was written, only tokenizer.model" in capsys.readouterr().err
    assert (tmp_path / "out/tokenizer.model").exists() and not (tmp_path / "out/tokenizer.json").exists()


def test_tokenizer_files_that_are_none(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer(bad).encode("x")
    small = run_of(tmp_path / "run", {**LLAMA, "vocabulary": 448})
    shutil.copyfile(tokenizer, small / "tokenizer.model")
    assert "has 512 ids, but the model's vocabulary is 448" in refused(
        capsys, "export", small, "--out", tmp_path / "out"
    )
