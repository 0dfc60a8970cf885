"""The proof of resuming: holds for every engine; and what a broken resume forgets is named."""

from __future__ import annotations

import shutil
import signal
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pretrain.config import load
from pretrain.verify_resume import compare
from pretrain.verify_resume.__main__ import main
from pretrain.verify_resume.proof import RunFailed, Start, prove
from pretrain.verify_resume.worker import Task, work
from tests.pretrain.train.small_run import SETTINGS, configuration, quick
from tests.ranks import TRAINING, Died, run_ranks

ZERO2 = ("engine.kind=deepspeed", "engine.stage=2")
PIPELINE = ("mesh.pp=2",)


def forget_random_streams() -> AbstractContextManager[Any]:
    return mock.patch("pretrain.train.save.restore_random_state", lambda states: None)


def zero_a_moment() -> AbstractContextManager[Any]:
    from parallel.engines.torch import TorchEngine

    load = TorchEngine.load_state_tensors

    def forgetful(self: TorchEngine, tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in sorted(tensors.items()) if name.endswith("/exp_avg")).zero_()
        load(self, tensors)

    return mock.patch.object(TorchEngine, "load_state_tensors", forgetful)


def skip_a_sequence() -> AbstractContextManager[Any]:
    from pretrain.data.loader import Loader

    load = Loader.load_state_dict

    def ahead(self: Loader, state: dict[str, Any]) -> None:
        load(self, {**state, "sequences": state["sequences"] + 1})

    return mock.patch.object(Loader, "load_state_dict", ahead)


def start_anew() -> AbstractContextManager[Any]:
    return mock.patch("pretrain.train.build.restore", lambda *_, **__: False)


FAULTS = {
    "none": nullcontext,
    "random streams": forget_random_streams,
    "moment": zero_a_moment,
    "data": skip_a_sequence,
    "all": start_anew,
}


def on_rank(rank: int, world: int, task: Task, fault: str) -> int:
    with FAULTS[fault if task.arrival else "none"](), quick():
        return work(task)


def forked(fault: str = "none") -> Start:
    """Ranks forked warm instead of started: the same three runs in a fifth of the time."""

    def start(task: Task, ranks: int) -> list[int]:
        may_die = range(ranks) if task.kill_after else ()
        ends = run_ranks(on_rank, ranks, task, fault, may_die=may_die, preload=TRAINING)
        return [end.exitcode if isinstance(end, Died) else end for end in ends]

    return start


def run(
    corpus: Path, scratch: Path, world: int, *overrides: str, start: Start | None = None
) -> tuple[list[str], list[str]]:
    """(faults found, lines said)."""
    config = configuration(Path("runs/never-used"), corpus, "train.steps=5", *overrides)
    lines: list[str] = []
    return prove(config, world, 2, scratch, lines.append, start or forked()), lines


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """The three runs of one rank: their folder, what was found and said."""
    scratch = tmp_path_factory.mktemp("one")

    def start(task: Task, ranks: int) -> list[int]:
        ends = forked()(task, ranks)
        shutil.copytree(load(task.config).run, scratch / f"after-{task.config.stem}")
        return ends

    return scratch, *run(corpus, scratch, 1, start=start)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(2, ()), (2, ZERO2), (2, PIPELINE)],
    ids=["FSDP2", "ZeRO-2", "pipeline"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    world: int, overrides: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    faults, lines = run(corpus, tmp_path, world, *overrides)
    assert faults == []
    assert len(lines) == 9 and all(line.endswith("equal bit for bit") for line in lines[3:])


def test_what_is_compared(one_rank: tuple[Path, list[str], list[str]]) -> None:
    scratch, faults, lines = one_rank
    assert faults == []
    assert [line.split(":")[0].split(",")[0] for line in lines] == [
        "uninterrupted", "interrupted", "resumed", "step 2 of both runs", "state after resuming", "step 5", "metrics.jsonl",
        "validation.jsonl", "step 5 of both runs",
    ]  # fmt: skip
    assert "killed in step 4" in lines[1] and "5 records: equal bit for bit" in lines[6]
    assert {"step", "tokens", "data", "config"} <= {*lines[5].split("(")[1].split(")")[0].split(", ")}
    assert all(line.endswith("equal bit for bit") for line in lines[3:])
    assert sorted(path.name for path in (scratch / "resumed/checkpoints").iterdir()) == [
        "latest", "step_00000002", "step_00000004", "step_00000005",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("random streams", ["not restored: rank/0/rng_cpu[", "step 5: rank/0/rng_cpu["]),
        (
            "moment",
            [
                "not restored: optimizer/",
                "/exp_avg[0",
                " in the checkpoint, 0.0 after resuming",
                "metrics.jsonl, step 4: ",
            ],
        ),
        ("data", ["step 5, meta.json: data.sequences: 20 uninterrupted, 21 resumed", "metrics.jsonl, step 3: "]),
        ("all", ["the run was resumed after step 0 instead of step 2"]),
    ],
)
def test_what_resuming_forgets_is_named(
    fault: str, said: list[str], corpus: Path, tmp_path: Path, one_rank: tuple[Path, list[str], list[str]]
) -> None:
    def start(task: Task, ranks: int) -> list[int]:
        if task.arrival:
            return forked(fault)(task, ranks)
        shutil.copytree(one_rank[0] / f"after-{task.config.stem}", load(task.config).run)  # these runs have no fault
        return [-9 if task.kill_after else 0]

    faults, _ = run(corpus, tmp_path, 1, start=start)
    text = "\n".join(faults)
    assert all(part in text for part in said), text
    assert said[0] in faults[0]
    restored = [line for line in faults if line.startswith("not restored")]
    if fault in ("random streams", "moment"):
        assert len(restored) == 1  # that tensor and no other
    else:
        assert restored == []


def test_a_run_that_fails_is_told_with_its_last_words(corpus: Path, tmp_path: Path) -> None:
    config = configuration(Path("runs/never-used"), corpus, "train.steps=5")

    def start(task: Task, ranks: int) -> list[int]:
        task.config.with_suffix(".rank1.log").write_text("error: the disk is on fire\n")
        return [-signal.SIGTERM, 77]

    with pytest.raises(RunFailed, match=r"(?s)uninterrupted run: rank 1 ended with exit code 77.*the disk is on fire"):
        prove(config, 2, 2, tmp_path, lambda line: None, start)


def test_tensors_are_compared_bit_by_bit(tmp_path: Path) -> None:
    from pretrain.checkpoint.lifecycle import Checkpoints

    nan = float("nan")
    one = {"model/a": torch.tensor([[1.0, 2.0], [nan, 0.0]]), "model/b": torch.tensor(3), "model/c": torch.zeros(2)}
    other = {**one, "model/a": torch.tensor([[1.0, 2.0], [nan, -0.0]]), "model/b": torch.tensor(4)}
    folders = [Checkpoints(tmp_path / str(i)).save(1, state, {}) for i, state in enumerate((one, one, other))]
    names = ("left", "right")
    assert compare.tensors(folders[0], folders[1], names) == compare.Tensors(3, 16 + 8 + 8, [])
    assert compare.tensors(folders[0], folders[2], names).faults == [
        "model/a[1, 1]: 0.0 left, -0.0 right (1 of 4 numbers differ)",
        "model/b: 3 left, 4 right (it is the only number)",
    ]
    less = Checkpoints(tmp_path / "less").save(1, {"model/a": one["model/a"], "model/c": torch.zeros(3)}, {})
    assert compare.tensors(folders[0], less, names).faults == [
        "model/b is missing in the right state",
        "model/c is float32 [2] in the left state, float32 [3] in the right",
    ]


def test_fields_are_compared_exactly() -> None:
    same = {"a": {"b": [1, float("nan")]}, "config": {"run": "x", "train": {"lr": 0.1}}}
    assert compare.fields(same, {**same, "config": {"run": "y", "train": {"lr": 0.1}}}, ("left", "right")) == []
    other = {"a": {"b": [1.0, float("nan")]}, "config": {"run": "x", "train": {"lr": 0.1}}, "window": [2]}
    assert compare.fields(same, other, ("left", "right")) == [
        "a.b.0: 1 left, 1.0 right",
        "window.0: absent left, 2 right",
    ]


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With warm ranks; in processes of its own: the command of README.md, on two ranks."""
    arguments = ["--config", "configs/runs/quickstart.yaml", "--steps", "4", "--at", "2", *SETTINGS]
    with mock.patch("pretrain.verify_resume.proof.prove", partial(prove, start=forked())):
        assert main([*arguments, f"run={tmp_path / 'run'}", f"data.path={corpus}"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "resumed equals uninterrupted, bit for bit"
    assert "4 records: equal bit for bit" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at", "1"], "--at must be from 2 to --steps minus 2"),
        (["--at", "7"], "--at must be from 2 to --steps minus 2"),
        (["--ranks", "0"], "--ranks 0: give a number of at least 1"),
        (["train.batch=3", "--ranks", "2", "train.micro_batch=1"], "train.batch = 3: not a multiple of 2"),
        (["nothing=3"], "nothing"),
    ],
)
def test_bad_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["--config", "configs/runs/quickstart.yaml", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
