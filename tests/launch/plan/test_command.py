from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.plan.__main__ import main, parse
from pretrain.estimate.model import ModelCosts
from pretrain.model.files import count, empty
from tests.launch.plan.cases import counted, files

ROOT = Path(__file__).resolve().parents[3]
ZAYA = [
    "--config",
    str(ROOT / "configs/models/zaya1_8b.yaml"),
    "--hardware",
    str(ROOT / "configs/hardware/mi300x.yaml"),
]


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCosts, "of", counted)


def plan(folder: Path, *arguments: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """(exit code, what --json wrote)."""
    config, hardware = files(folder, **options)
    out = folder / "plan.json"
    code = main(["--config", str(config), "--hardware", str(hardware), "--json", str(out), *arguments])
    return code, json.loads(out.read_text())


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_any_number_of_gpus(tmp_path: Path, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan(tmp_path, "--gpus", str(gpus))
    assert code == 0
    assert finite(found)
    forecast = found["forecast"]
    assert forecast["tokens_a_second"] > 0
    assert 0 < forecast["mfu"] < 1
    assert forecast["tokens_a_second_a_gpu"] * gpus == pytest.approx(forecast["tokens_a_second"])
    assert sum(value for key, value in forecast["seconds"].items() if key not in ("hidden", "step")) == pytest.approx(
        forecast["seconds"]["step"]
    )
    assert bool(forecast["collectives"]) == (gpus > 1)
    text = capsys.readouterr().out
    assert "Most of the step is" in text
    assert f"on {gpus} x Round" in text


def test_the_largest_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ZAYA, "--gpus", "100000", "mesh.replicate=12500"]) == 0
    out = capsys.readouterr().out
    assert "dp 100000 (replicate 12500 x shard 8)" in out
    assert "12500 nodes" in out


def test_zaya_on_its_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ZAYA, "--gpus", "1024", "mesh.replicate=64", "--tokens", "12T", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"]["parameters"] == 8_840_478_544
    assert found["question"]["active_parameters"] == 1_290_731_344
    # 16.78 M tokens a step, as ZAYA1 was trained (arXiv 2605.05365, appendix B).
    assert found["forecast"]["train"]["batch"] * 4096 == 16_777_216
    assert found["forecast"]["flops"]["step"] / 16_777_216 == pytest.approx(8.75e9, rel=0.02)
    assert found["forecast"]["memory"]["fits"]


def test_numbers_follow_from_each_other(tmp_path: Path) -> None:
    _, found = plan(tmp_path, "--gpus", "8", "--node-mtbf", "100h", "--save-seconds", "2", "--verbose")
    forecast, failures = found["forecast"], found["failures"]
    seconds = forecast["seconds"]["step"]
    assert forecast["tokens_a_second"] == pytest.approx(64 * 1024 / seconds)
    assert forecast["days"] == pytest.approx(1000 * seconds / 86400)
    assert forecast["mfu"] == pytest.approx(forecast["flops"]["step"] / seconds / 8 / 100e12)
    assert failures["nodes"] == 1 and failures["mtbf"] == 360_000
    assert failures["per_day"] == pytest.approx(0.24)
    assert failures["young"] == pytest.approx(math.sqrt(2 * 2 * 360_000))
    memory = forecast["memory"]
    assert memory["room"] == pytest.approx(0.95 * 16 * 2**30)
    assert memory["excess"] == pytest.approx(memory["peak"] - memory["room"])
    none, full = found["recompute"]["none"], found["recompute"]["full"]
    assert full["activations"] < none["activations"]
    assert full["recomputed_flops"] > none["recomputed_flops"] == 0
    assert full["step_seconds"] > none["step_seconds"]


def test_a_share_above_one_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A measured ceiling above the nominal one, which is another chip's."""
    config, hardware = files(tmp_path)
    wrong = hardware.read_text().replace("bf16_tflops: 100", "bf16_tflops: 0.000001")
    hardware.write_text(wrong + "measured: {date: 2026-01-01, device: x, torch: y, matmul_tflops: {bf16: 100}}\n")
    arguments = [
        "--config",
        str(config),
        "--hardware",
        str(hardware),
        "--gpus",
        "8",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(arguments) == 1
    forecast = json.loads((tmp_path / "out.json").read_text())["forecast"]
    assert forecast["mfu"] is None and 0 < forecast["mfu_ceiling"] < 1
    printed = capsys.readouterr()
    assert "MFU is an error, not a number" in printed.err and "datasheet of Round" in printed.err
    assert "MFU no number of the nominal rate" in printed.out


def test_saves_are_as_large_as_the_optimizer_makes_them(tmp_path: Path) -> None:
    """fp32 weights, and two moments for each, or one."""
    sizes = {}
    for kind in ("adamw", "sgd"):
        _, found = plan(
            tmp_path, "--gpus", "8", "checkpoint.background=false", "--storage-gbs", "0.001", f"optimizer.kind={kind}"
        )
        parameters = found["question"]["parameters"]
        sizes[kind] = found["failures"]["save"] / parameters
    assert sizes["adamw"] / sizes["sgd"] == pytest.approx(1.5, rel=1e-3)


def test_a_job_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan(tmp_path, "--gpus", "8", "train.micro_batch=8", memory=0.02)
    assert code == 1
    assert not found["forecast"]["memory"]["fits"]
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "GiB too much" in out
    for remedy in found["would_fit"]:
        assert remedy["memory"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "10", "mesh.tp=4"], "does not divide 10"),
        (["--gpus", "7"], "train.batch = 64: not a multiple of 7"),
        (["--gpus", "8", "mesh.tpp=4"], "did you mean 'tp'"),
        (["--gpus", "8", "mesh.tp=8"], "cannot be cut over mesh.tp=8"),
        (["--gpus", "8", "mesh.ep=8"], "mesh.ep=8"),
        (["--gpus", "200000"], "choose from 1 to 100000"),
        (["--gpus", "8", "--plot", "x.png"], "--search"),
        (["--gpus", "8", "--search", "--plot", "x.bmp"], "ends in .png"),
        (["--gpus", "8", "--search", "--sweep", "gpus"], "two questions"),
        (["--gpus", "8", "nonsense"], "write key.sub=value"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, hardware = files(tmp_path)
    assert main(["--config", str(config), "--hardware", str(hardware), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, hardware = files(tmp_path)
    assert main(["--config", str(config), "--hardware", "mi999.yaml", "--gpus", "8"]) == 2
    assert "configs/hardware/mi300x.yaml" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "no.yaml"), "--hardware", str(hardware), "--gpus", "8"]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("modle: {}\n")
    assert main(["--config", str(tmp_path / "odd.yaml"), "--hardware", str(hardware), "--gpus", "8"]) == 2
    assert "no section `model:`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--gpus", "0"], ["--gpus", "x"], ["--gpus", "8", "--sweep", "nodes"], ["--gpus", "8", "--sweep", "gpus=1,x"],
     ["--gpus", "8", "--tokens", "many"], ["--gpus", "8", "--node-mtbf", "-3h"], ["--gpus", "8", "--overlap", "2"],
     ["--gpus", "8", "--storage-gbs", "0"]],
)  # fmt: skip
def test_options_that_are_none(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", "x", "--hardware", "y", *arguments])
    assert stopped.value.code == 2


def test_spans_and_numbers() -> None:
    given = ["--config", "x", "--hardware", "y", "--gpus", "8"]
    read = parse([*given, "--node-mtbf", "2d", "--tokens", "1.5T", "--sweep", "gpus=8,1"])
    assert (read.node_mtbf, read.tokens, read.sweep) == (172_800.0, 1.5e12, [1, 8])
    assert parse([*given, "--node-mtbf", "10"]).node_mtbf == 36_000.0


def test_a_search_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # no text is wrapped
    picture = tmp_path / "search.png"
    code, found = plan(tmp_path, "--gpus", "8", "--search", "--plot", str(picture))
    assert code == 0
    assert picture.stat().st_size > 10_000
    ranked = found["search"]["ranked"]
    assert ranked[0]["seconds"]["step"] == found["forecast"]["seconds"]["step"]
    out = capsys.readouterr().out
    assert "to use the first:" in out
    assert "the fastest" in out


def test_a_sweep_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sweep.svg"
    code, found = plan(tmp_path, "--gpus", "8", "--sweep", "gpus=1,8,64", "--keep-layout", "--plot", str(picture))
    assert code == 0
    assert picture.read_text().startswith("<?xml")
    assert [point["gpus"] for point in found["sweep"]["weak"]] == [1, 8, 64]
    assert "strong: 64 sequences" in capsys.readouterr().out


def test_the_planner_counts_what_the_model_has(tmp_path: Path) -> None:
    from pretrain.config import load

    _, found = plan(tmp_path, "--gpus", "1")
    config, _ = files(tmp_path)
    total, active = count(empty(load(config).model))
    assert found["question"]["parameters"] == total
    assert found["question"]["active_parameters"] == active


def test_sizing_advice(tmp_path: Path) -> None:
    _, found = plan(tmp_path, "--gpus", "8", model={"vocabulary": 500, "layers": ["gdn + mlp", "attention + moe"]})
    rules = {each["rule"].split(":")[0]: each for each in found["sizing"]}
    assert rules["head dim"]["keeps"] is False
    assert rules["vocabulary"]["keeps"] is False
    assert "model.vocabulary=512" in rules["vocabulary"]["fix"]
    assert rules["tensor parallelism"]["keeps"] is True
    assert all(each["reason"] and each["numbers"] for each in found["sizing"])


def test_tokens_per_expert_of_zaya(capsys: pytest.CaptureFixture[str]) -> None:
    """2 x 2048 x 4096 FLOPs a token: 200 GFLOP are 11.9 thousand tokens an expert (16 experts, top-1)."""
    main([*ZAYA, "--gpus", "1024", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    (rule,) = [each for each in found["sizing"] if each["rule"].startswith("tokens per expert")]
    assert "256 tokens an expert" in rule["numbers"]
    assert "11,921 would be enough" in rule["numbers"]
    assert rule["keeps"] is False
