"""The configuration: overrides, defaults, and one clear line for everything that can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config import ConfigError, RunConfig, dump, load

QUICKSTART = "configs/runs/quickstart.yaml"

WRONG = [
    ("model.widht=3", "model.widht: unknown key; did you mean 'width'? valid keys: block, ffns, init_std, layers"),
    ("model.width=abc", "model.width = 'abc': input should be a valid integer"),
    ("model.width=0", "model.width = 0: input should be greater than or equal to 1"),
    ("model.mixers.gdn.head=3", "model.mixers.gdn.head: unknown key; did you mean 'heads'?"),
    ("model.mixers.gdn.heads=many", "model.mixers.gdn.heads = 'many': input should be a valid integer"),
    (
        "model.mixers.gdn.kind=gated_deltanet",
        "model.mixers.gdn.kind = 'gated_deltanet': no such kind; did you mean 'gated_delta_net'?",
    ),
    ("model.mixers.new={heads: 2}", "model.mixers.new: needs `kind`"),
    (
        "model.layers=[gdm + moe]",
        "model: layer entry 'gdm + moe' names 'gdm', but mixers defines only gdn, attention; did you mean 'gdn'?",
    ),
    ("engine.kind=torh", "engine.kind = 'torh': no such kind; did you mean 'torch'? valid kinds: torch, deepspeed"),
    (
        "engine.stage=2",
        "engine.stage: unknown key; valid keys: bucket_bytes, kind, prefetch, reduce_each_micro_batch, reshard_after_forward",
    ),
    ("optimiser.lr=3", "optimiser: unknown key; did you mean 'optimizer'?"),
    ("schedule.warmup=-1", "schedule.warmup = -1: input should be greater than or equal to 0"),
    ("train.precision=fp16", "train.precision = 'fp16': input should be 'bf16' or 'fp32'"),
    ("train=5", "train = 5: should be a section with keys of its own"),
    ("train.steps=null", "train.steps = None: input should be a valid integer"),
    ("data.path=", "data.path = None: should be a path"),
    ("train.steps.x=3", "override 'train.steps.x=3': train.steps is the value 1000, not a section with keys"),
    ("model.layers.9=a", "override 'model.layers.9=a': '9' is not a position in a list of 3; count from 0"),
    ("steps", "override 'steps' cannot be read; write key.sub=value"),
    ("train.steps=[1", "override 'train.steps=[1': the value is not valid YAML"),
]


@pytest.mark.parametrize(("override", "line"), WRONG, ids=[override for override, _ in WRONG])
def test_each_mistake_is_one_line_that_says_what_to_do(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, [override])
    text = str(caught.value)
    assert line in text
    assert "\n" not in text and "pydantic" not in text


def test_several_mistakes_are_several_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, ["model.width=abc", "train.stepz=3"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(line.startswith(QUICKSTART) for line in lines)


def test_missing_section_and_missing_field_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    raw = yaml.safe_load(Path(QUICKSTART).read_text())
    del raw["data"], raw["model"]["width"]
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert f"{file}: data: required, and not there" in str(caught.value)
    assert f"{file}: model.width: required, and not there" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"a: [", "not valid YAML"), (b"- 1", "found list"), (b"\xff\xfe\x01", "cannot be read")]
)
def test_unreadable_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_missing_file_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"configs/runs/quickstart\.yaml"):
        load("configs/runs/quikstart.yaml")


def test_overrides_reach_every_depth_and_type() -> None:
    config = load(
        QUICKSTART,
        [
            "train.steps=7", "optimizer.lr=3e-4", "model.mixers.gdn.gate_decay=false", "engine.kind=deepspeed", "engine.stage=1",
            "model.layers.0=attention + moe", "run=elsewhere", "validation.every=null", "schedule={kind: cosine, warmup: 3}",
            "checkpoint.allow_changes=[data.seed]",
        ],
    )  # fmt: skip
    assert config.train.steps == 7 and config.optimizer.lr == 3e-4 and config.run == Path("elsewhere")
    assert config.model.mixers["gdn"].gate_decay is False and config.model.pattern()[0] == ("attention", "moe")
    assert config.engine.kind == "deepspeed" and config.engine.stage == 1
    assert config.validation.every is None and config.checkpoint.allow_changes == ["data.seed"]
    assert config.schedule.kind == "cosine" and config.schedule.warmup == 3


def test_sections_left_out_have_defaults_and_kinds_need_not_be_repeated() -> None:
    raw = yaml.safe_load(Path(QUICKSTART).read_text())
    for section in ("optimizer", "schedule", "checkpoint", "validation"):
        raw.pop(section)
    config = RunConfig.model_validate({**raw, "optimizer": {"lr": 1e-3}, "engine": {"reshard_after_forward": False}})
    assert config.optimizer.lr == 1e-3 and config.schedule.kind == "cosine"
    assert config.engine.kind == "torch" and config.engine.reshard_after_forward is False


def test_printed_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load(QUICKSTART, ["train.steps=9", "model.vocabulary=128"])
    file = tmp_path / "printed.yaml"
    file.write_text(dump(config))
    assert load(file) == config


def test_every_shipped_configuration_is_valid() -> None:
    files = sorted(Path("configs/runs").glob("*.yaml"))
    assert files
    for file in files:
        load(file)
