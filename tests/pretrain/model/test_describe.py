"""The model files have the parameters that they claim; `python -m pretrain.model describe` counts right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain import config as configuration
from pretrain.model import describe
from pretrain.model.__main__ import main
from pretrain.model.decoder import DecoderConfig
from pretrain.model.files import FOLDER, ModelFile, count, empty
from tests.pretrain.small import MODEL, decoder, tokens

FILES = sorted(FOLDER.glob("*.yaml"))

# What others count, from released configurations and weights or from the formulas of the papers.
KNOWN = {
    "mamba_370m": 371_516_416,
    "mamba_1_4b": 1_372_178_432,
    "transformer_340m": 24 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 2 * 32000 * 1024 + 1024,
    "transformer_1_3b": 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2 * 32000 * 2048 + 2048,
    "delta_net_340m": 24 * (4 * 1024**2 + 1024 * 8 + 3 * 1024 * 4 + 128 + 3 * 1024 * 2816 + 2 * 1024) + 65_537_024,
    "qwen3_next_80b": 79_674_391_296,
    # 40 layers of attention 5,575,682, router 660,752 without the 16 balancing biases, which are no parameters, and without
    # the first layer's average over depth, experts, residual scaling and norms; embedding with its scaling; final norm.
    "zaya1_8b": 40 * (5_575_682 + 660_736 + 16 * 12_582_912 + 8 * 2048 + 2 * 2048) - 256 + 262_272 * 2048 + 3 * 2048,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_file_has_the_parameters_that_it_claims(path: Path) -> None:
    file = ModelFile.model_validate(yaml.safe_load(path.read_text()))
    assert (file.parameters, file.active_parameters) == count(empty(file.model))
    if path.stem in KNOWN:
        assert file.parameters == KNOWN[path.stem]
    scale = {"340m": 3.4e8, "370m": 3.7e8, "1_3b": 1.3e9, "1_4b": 1.4e9}
    nominal = next((value for size, value in scale.items() if path.stem.endswith(size)), None)
    assert nominal is None or 0.95 < file.parameters / nominal < 1.15


def test_every_family_comes_in_both_sizes() -> None:
    families = ("transformer", "gla", "retnet", "hgrn2", "delta_net", "gated_delta_net", "kda", "mamba2", "mamba")
    for family in (*families, "hourglass", "union_of_experts"):
        sizes = {path.stem.removeprefix(f"{family}_") for path in FILES} & {"340m", "370m", "1_3b", "1_4b"}
        assert len(sizes) == 2, family


@pytest.mark.parametrize("size", ["340m", "1_3b"])
def test_hourglass_and_union_match_their_dense_twin(size: str) -> None:
    def parameters(name: str) -> int:
        return yaml.safe_load((FOLDER / f"{name}_{size}.yaml").read_text())["parameters"]

    dense = parameters("transformer")
    width = 1024 if size == "340m" else 2048
    assert parameters("hourglass") - dense == 24 * 3 * width  # three norms a layer more
    heads = width // 64
    assert parameters("union_of_experts") - dense == 24 * ((heads + 8) * width)  # the routers


def test_zaya_is_the_published_size() -> None:
    total, active = count(empty(ModelFile.model_validate(yaml.safe_load((FOLDER / "zaya1_8b.yaml").read_text())).model))
    embedding = 262_272 * 2048
    assert round((total - embedding) / 1e9, 3) == 8.303 and round((active - embedding) / 1e9, 3) == 0.754


def test_cache_is_what_generation_holds() -> None:
    """The predicted bytes against a decoder's own cache, after a prompt and 40 steps, in fp32."""
    config = DecoderConfig.model_validate({**MODEL, "layers": ["gdn + swiglu x2", "attention + swiglu"]})
    model = decoder(layers=config.layers).eval()
    cache = model.new_cache()
    with torch.inference_mode():
        model(tokens(1, 20), cache=cache)
        for _ in range(40):
            model(tokens(1, 1), cache=cache)
    gdn, attention = (describe.cache_size(config.mixers[name], 32) for name in ("gdn", "attention"))
    assert gdn.per_token == 0 and attention.per_sequence == 0
    # bf16 halves what holds activations; the recurrent state stays in fp32.
    assert attention.per_token == 2 * 2 * 8 * 2
    state, tail = 4 * 8 * 12 * 4, 3 * (2 * 2 * 8 + 4 * 12) * 2
    assert gdn.per_sequence == state + tail
    assert cache.bytes() == 2 * (state + 2 * tail) + 60 * 2 * attention.per_token
    window = describe.cache_size(config.mixers["window"], 32)
    assert [window.at(n) for n in (2, 4, 100)] == [2 * 64, 4 * 64, 4 * 64]  # 2 heads of 8, keys and values, bf16


def test_the_table_adds_up() -> None:
    config = DecoderConfig.model_validate({**MODEL, "multi_token": {"layer": "attention + swiglu"}})
    found = describe.describe(config, length=199)
    assert [(group.name, group.layers) for group in found.groups] == [
        ("gdn + moe", [0, 1]), ("attention + hourglass", [2]), ("window + swiglu", [3])
    ]  # fmt: skip
    layers = sum(group.parameters * len(group.layers) for group in found.groups)
    assert layers + sum(parameters for _, parameters, _ in found.rest) == found.parameters
    flops = sum(group.flops * len(group.layers) for group in found.groups) + sum(cost for _, _, cost in found.rest)
    assert flops == pytest.approx(found.flops)
    moe = found.groups[0]
    assert moe.parameters - moe.active == 2 * 3 * 32 * 16  # two of four experts stay idle


def test_ranges_are_short() -> None:
    assert describe.ranges([0]) == "0"
    assert describe.ranges([0, 1, 2, 5]) == "0-2, 5"
    assert describe.ranges([3, 7, 11, 15]) == "3, 7 .. 15"
    assert [describe.size(n) for n in (0, 512, 1536, 3 << 20, 5 << 40)] == [
        "-",
        "512 B",
        "1.5 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]


def model_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, **changes}))
    return path


def test_describe_writes_table_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(tmp_path)
    picture, numbers = tmp_path / "stack.png", tmp_path / "numbers.json"
    assert main(["describe", "--config", str(path), "--plot", str(picture), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    total = sum(p.numel() for p in decoder().parameters())
    assert f"{total:,}" in printed and "gdn + moe" in printed
    assert json.loads(numbers.read_text())["parameters"] == total
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_describe_tells_a_file_that_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--config", str(model_file(tmp_path, parameters=5))]) == 1
    assert "expects parameters: 5, but the model has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"model": {**MODEL, "widht": 3}}, [], "model.widht: unknown key; did you mean 'width'"),
        ({"model": {**MODEL, "vocabulary": None}}, [], "say --vocabulary N"),
        ({"data": {}}, [], "has no section `model:`"),
        ({"model": "configs/models/none.yaml"}, [], "no such file; configs/models has"),
    ],
)
def test_describe_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, Any], arguments: list[str], message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["describe", "--config", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_file_may_name_a_model_file(tmp_path: Path) -> None:
    run = yaml.safe_load(Path("configs/runs/quickstart.yaml").read_text())
    run["model"] = "configs/models/gla_340m.yaml"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    loaded = configuration.load(path, ["model.width=512"])
    assert loaded.model.width == 512 and [str(layer) for layer in loaded.model.pattern()] == ["gla + swiglu"] * 24
    loaded = configuration.load(path, ["model.width=256", "model=configs/models/delta_net_340m.yaml"])
    assert loaded.model.width == 256 and str(loaded.model.pattern()[0]) == "delta_net + swiglu"
    whole = "model={width: 32, mixers: {a: {kind: attention, heads: 2}}, layers: [a x2]}"
    assert [str(layer) for layer in configuration.load(path, [whole]).model.pattern()] == ["a", "a"]
    run["model"] = "gla_34m.yaml"
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(
        configuration.ConfigError, match=r"model = 'gla_34m\.yaml': no such file; configs/models has delta_net"
    ):
        configuration.load(path)
