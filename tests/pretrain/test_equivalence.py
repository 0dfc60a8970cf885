"""The equivalence gate: five models on a sample of layouts, every file of configs/ shrunk, and what the command refuses."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import MeshConfig
from parallel.whole import Whole
from pretrain.config import RunConfig, read_yaml
from pretrain.equivalence import layouts
from pretrain.equivalence.__main__ import configuration, main, parse
from pretrain.equivalence.compare import DOUBLE, SINGLE, compare, idle, worst
from pretrain.equivalence.gate import short_run
from pretrain.equivalence.shrink import SHARED, SMALL, shrink
from pretrain.equivalence.training import Outcome, joined, rows
from pretrain.model.decoder import DecoderConfig
from pretrain.model.files import model_section
from tests.pretrain.equivalence_models import MODELS, config, verdicts
from tests.ranks import ROOT, TRAINING, launch, run_ranks

FILES = sorted([*(ROOT / "configs/models").glob("*.yaml"), *(ROOT / "configs/runs").glob("*.yaml")])


def sample(model: str, world: int, count: int) -> list[MeshConfig]:
    """Some of the model's layouts, always the same ones; each axis is in as many as it can be."""
    legal = layouts.legal(short_run(config(model), world), world)
    return random.Random(f"{model} {world}").sample(legal, min(count, len(legal)))


def check(found: dict[str, Any], expected: int) -> None:
    print("".join(f"\n{model}, {layout}: {of[layout][2]}" for model, of in found.items() for layout in of))
    wrong = [
        f"{model}, {layout}: {faults}"
        for model, of in found.items()
        for layout, (agrees, faults, _) in of.items()
        if not agrees
    ]
    assert not wrong, "\n".join(wrong)
    assert sum(map(len, found.values())) == expected


@pytest.mark.parametrize(("world", "count"), [(2, 2), (4, 1)])  # more of them: mutation_ranks.py, and the campaign
def test_layouts_train_as_one_rank(world: int, count: int) -> None:
    wanted = [(model, sample(model, world, count)) for model in MODELS]
    found = run_ranks(verdicts, world, wanted, timeout=300, preload=TRAINING)[0]
    check(found, count * len(MODELS))


@pytest.mark.campaign
@pytest.mark.parametrize(("model", "world"), itertools.product(MODELS, (2, 4, 8)))
def test_every_layout_trains_as_one_rank(model: str, world: int) -> None:
    """All layouts of 2 and 4 ranks, 12 of 8 ranks; `pytest --campaign -s` prints the table."""
    legal = layouts.legal(short_run(config(model), world), world) if world < 8 else sample(model, world, 12)
    check(run_ranks(verdicts, world, [(model, legal)], timeout=3000, preload=TRAINING)[0], len(legal))


def test_five_models_have_every_axis() -> None:
    """Their layouts of 4 ranks use every axis, every schedule and both ways of attention."""
    names = ",".join(
        layouts.name(mesh, 4) for model in MODELS for mesh in layouts.legal(short_run(config(model), 4), 4)
    )
    wanted = ["pp=4", "dp=4", "replicate=4", "cp=4", "tp=4", "ep=4", "expert_tensor=true", "context=ring"]
    assert [part for part in [*wanted, "pp_schedule=interleaved", "pp_schedule=zbv"] if part not in names] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shrunk_model_keeps_every_kind_and_option(file: Path) -> None:
    large = DecoderConfig.model_validate(model_section(read_yaml(file)["model"], file))
    small, said = shrink(large, 4)
    sizes = {*SMALL, *SHARED}
    assert {str(layer) for layer in large.pattern()} == {str(layer) for layer in small.pattern()}
    for group in ("mixers", "ffns"):
        for name, before in getattr(large, group).items():
            one, other = before.model_dump(), getattr(small, group)[name].model_dump()
            assert {key: value for key, value in one.items() if key not in sizes} == {
                key: value for key, value in other.items() if key not in sizes
            }
            assert [key for key, value in one.items() if bool(value) != bool(other[key])] == []
            for fewer, more in (
                ("kv_heads", "heads"),
                ("heads", "value_heads"),
                ("top_k", "experts"),
                ("head_dim", "value_dim"),
            ):
                if one.get(fewer) and one.get(more) and one[fewer] < one[more]:
                    assert other[fewer] < other[more], (name, fewer, more)
    keep = {"mixers", "ffns", "layers", "repeat", "vocabulary", "width", "init_std"}
    assert large.model_dump(exclude=keep) == small.model_dump(exclude=keep)
    assert said and all(" -> " in line for line in said)
    run, _ = configuration(parse(["--config", str(file)]), 2)
    assert isinstance(run, RunConfig) and len(layouts.legal(run, 2)) >= 5


def test_layouts_have_names_that_make_them() -> None:
    run = short_run(config("attention MoE"), 4)
    for mesh in layouts.legal(run, 4):
        again = layouts.parse(layouts.name(mesh, 4), run, 4)
        assert again.grid(4) == mesh.grid(4)
        assert (again.context, again.pp_schedule) == (mesh.context, mesh.pp_schedule)


def refuse(monkeypatch: pytest.MonkeyPatch, *arguments: str, world: int = 2) -> int:
    """The command as one of `world` ranks that have nobody to meet: it must end before it looks for them."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("parallel.processes.join", None)
    return main(["--config", str(ROOT / "configs/runs/quickstart.yaml"), *arguments])


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        (["--layouts", "tp=3"], 2, r"--layouts tp=3: .*mesh\.tp one of 1, 2\nlayouts of this model on 2 rank\(s\): tp=2 cp=2 "),
        (["--layouts", "cp=2", "tq=2"], 2, r"--layouts tq=2: tq: unknown key; did you mean 'tp'\? valid keys: "),
        (["--layouts", "tp=4"], 4, r"heads=2 .*this model allows mesh\.tp 1, 2"),
        ([], 1, "one rank has nothing to be compared with; .*torchrun"),
        (["--steps", "0"], 2, "--steps 0: give a number of at least 1"),
        (["--stage", "3"], 2, "--stage is of --engine deepspeed"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], world: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = refuse(monkeypatch, *arguments, world=world)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(message, (said := capsys.readouterr().err), re.DOTALL), said


def test_list_needs_no_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(monkeypatch, "--list", "2") == 0
    assert capsys.readouterr().out.split()[:4] == ["tp=2", "cp=2", "cp=2,context=ring", "dp=2"]


def test_the_command_prints_a_table_and_says_how_the_model_was_shrunk() -> None:
    done = launch(
        ["-m", "pretrain.equivalence", "--config", "configs/models/transformer_340m.yaml", "--layouts", "tp=2", "pp=2"],
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "ffns.swiglu.hidden 2816 -> 64" in " ".join(done.stdout.split())
    assert re.search(r"^tp=2 +\d.*equal *$", done.stdout, re.MULTILINE)
    assert "2 of 2 layouts of 2 ranks train as one rank does." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "1/2 tp=2: equal" in done.stderr


def outcome(**changes: Any) -> Outcome:
    whole = {"a": Whole(torch.tensor([1.0, -2.0]), 0.0), "b": Whole(torch.zeros(2), 0.0)}
    fields: dict[str, Any] = {
        "losses": [4.0, 3.0], "norms": [[1.0, 2.0], [1.0, 2.0]], "gradients": whole, "updates": whole,
        "sizes": {}, "loads": [{"r": [torch.tensor([3, 4])]}],
    }  # fmt: skip
    return Outcome(**fields | changes)


def test_equal_outcomes_agree() -> None:
    verdict = compare(outcome(), outcome())
    assert verdict.agrees and max(verdict.gradient.error, verdict.update.error, verdict.loss.error) == 0.0
    assert idle(outcome()) == ["b"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("loss", {"losses": [4.0, 3.00001]}),
        ("loss", {"losses": [4.0, float("nan")]}),
        ("norm", {"norms": [[1.0, 2.0001], [1.0, 2.0001]]}),
        ("copies", {"norms": [[1.0, 2.0], [1.0, 2.0 + 1e-15]]}),
        ("gradient", {"gradients": {"a": Whole(torch.tensor([1.0, -2.0001]), 0.0), "b": Whole(torch.zeros(2), 0.0)}}),
        ("gradient", {"gradients": {"a": Whole(torch.tensor([1.0, float("nan")]), 0.0), "b": Whole(torch.zeros(2), 0.0)}}),
        ("gradient", {"gradients": {"a": Whole(torch.tensor([1.0, -2.0]), 0.0)}}),
        ("gradient", {"gradients": {"a": Whole(torch.tensor([1.0, -2.0]), 0.0), "b": Whole(torch.full((2,), 1e-3), 0.0)}}),
        ("copies", {"gradients": {"a": Whole(torch.tensor([1.0, -2.0]), 1e-9), "b": Whole(torch.zeros(2), 0.0)}}),
        ("copies", {"updates": {"a": Whole(torch.tensor([1.0, -2.0]), 0.0), "b": Whole(torch.zeros(2), 1e-12)}}),
        ("update", {"updates": {"a": Whole(torch.tensor([1.0, -2.001]), 0.0), "b": Whole(torch.zeros(2), 0.0)}}),
        ("loads", {"loads": [{"r": [torch.tensor([3, 4])]}, {"r": [torch.tensor([3, 5])]}]}),
        ("loads", {"loads": [{}]}),
    ],
)  # fmt: skip
def test_every_kind_of_difference_counts(kind: str, changes: dict[str, Any]) -> None:
    verdict = compare(outcome(**changes), outcome())
    assert not verdict.agrees
    (fault,) = verdict.faults()
    assert fault.startswith(f"{kind} of ")


def test_a_reference_without_numbers_never_agrees() -> None:
    broken = {"a": Whole(torch.tensor([float("inf"), 1.0]), 0.0)}
    assert worst(broken, broken, SINGLE["gradient"]).error == float("inf")


def test_one_rank_sees_the_same_micro_batches() -> None:
    steps = rows(2, 4, 32, 64)
    packed = joined(steps, 2)
    assert [len(step) for step in packed] == [2, 2] and packed[0][0].tokens.shape == (1, 64)
    assert torch.equal(packed[1][1].targets, torch.cat((steps[1][2].targets, steps[1][3].targets), 1))
    assert packed[0][0].cu_seqlens.tolist() == [
        *steps[0][0].cu_seqlens.tolist(), *(32 + border for border in steps[0][1].cu_seqlens.tolist()[1:]),
    ]  # fmt: skip
    assert len({row.scored for step in steps for row in step}) > 4  # rows that weigh unlike


def test_fp64_decides_whether_it_was_rounding() -> None:
    off = {"a": Whole(torch.tensor([1.0, -2.0001]), 0.0), "b": Whole(torch.zeros(2), 0.0)}
    doubt = compare(outcome(gradients=off), outcome())
    assert doubt.doubtful and not doubt.agrees
    assert doubt._replace(double=compare(outcome(), outcome(), DOUBLE)).agrees
    assert not doubt._replace(double=compare(outcome(gradients=off), outcome(), DOUBLE)).agrees
    assert not compare(outcome(), outcome()).doubtful
    assert not compare(outcome(losses=[4.0, 3.1]), outcome()).doubtful  # too much for rounding
    assert not compare(outcome(loads=[{}]), outcome()).doubtful
