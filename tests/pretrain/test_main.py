"""The training command as people start it: every launcher, exit codes, signals, and what can be wrong with a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain import load
from pretrain.generate import main as generate
from tests.pretrain.train.small_run import SETTINGS, losses
from tests.pretrain.watch.watched import Job, Jobs, jobs, until
from tests.ranks import QUIET, ROOT

MAIN = [sys.executable, "pretrain/main.py", "--config", "configs/runs/quickstart.yaml", *SETTINGS]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**QUIET, **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def call(*arguments: object, command: list[str] = MAIN) -> subprocess.CompletedProcess[str]:
    line = [*command, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def start() -> Iterator[Jobs]:
    """For what need not be a process of its own from its imports on: the command and its watcher, but warm."""
    with jobs() as started:
        yield started


def warm(start: Jobs, *overrides: object) -> Job:
    return start(1, [*MAIN[2:], *map(str, overrides)])


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of plain python."""
    folder = tmp_path_factory.mktemp("main") / "run"
    done = call(f"run={folder}", f"data.path={corpus}", "validation.every=3", "log.tensorboard=true")
    assert done.returncode == 0, done.stderr
    assert "finished 6 steps" in done.stdout and "step 3: validation loss" in done.stdout
    return folder


def test_a_run_folder_has_what_the_readme_says(run: Path, corpus: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert set(records[0]) >= {
        "step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu", "mfu_measured",
        "memory_bytes", "load_entropy",
    }  # fmt: skip
    assert records[-1]["tokens"] == 6 * 4 * 32
    assert 0 < records[-1]["mfu_measured"] < 1 and records[-1]["mfu"] is None
    assert all(0 <= value <= 1 for value in records[-1]["load_entropy"].values())
    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in validation] == [3, 6]
    assert validation[-1]["scored_bytes"] == (corpus / "validation_text.bin").stat().st_size
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"]
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000003", "step_00000006"]


def test_a_finished_run_started_again_does_nothing_more(run: Path, corpus: Path, start: Jobs) -> None:
    before = (run / "metrics.jsonl").read_text()
    again = warm(start, f"run={run}", f"data.path={corpus}")
    assert again.codes() == [0] and "resumed after step 6" in again.said(0)
    assert (run / "metrics.jsonl").read_text() == before


def test_generate_and_load_use_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", str(run), "--tokens", "20", "--seed", "3", "--prompt", "def "]
    first = call(command=[sys.executable, "-m", "pretrain.generate", *command])
    assert first.returncode == 0, first.stderr
    assert generate(command) == 0
    assert first.stdout.startswith("def ") and capsys.readouterr().out == first.stdout
    model, tokenizer = load(str(run))
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("import os")]])
    logits = model(ids)
    assert logits.dtype == torch.float32 and logits.shape == (1, ids.shape[1], 512)


def test_a_run_in_use_is_refused_and_after_sigterm_goes_on(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """SIGTERM saves and exits 75. All of the first job is real: a process that a shell would start."""
    settings = (
        f"run={tmp_path}",
        f"data.path={corpus}",
        "checkpoint.every=100000",
        "train.steps=100000",
        "log.every=1",
    )
    process = subprocess.Popen([*MAIN, *settings], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step ") and "loss" in line:
                break
        holder = json.loads((tmp_path / "lease.json").read_text())["pid"]
        assert Path(f"/proc/{holder}/stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)  # its child
        one_line(warm(start, *settings), 1, str(tmp_path), f"process {holder} ")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 75
    finally:
        process.kill()
    assert "stopped by SIGTERM" in rest
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert len(losses(tmp_path)) == step
    again = warm(start, *settings, f"train.steps={step + 2}")
    assert again.codes() == [0] and f"resumed after step {step}" in again.said(0)
    assert len(losses(tmp_path)) == step + 2


def test_kill_leaves_the_last_checkpoint_and_the_run_goes_on(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    settings = (f"run={tmp_path}", f"data.path={corpus}", "checkpoint.every=2", "train.steps=100000")
    job = warm(start, *settings)
    until(lambda: list((tmp_path / "checkpoints").glob("step_0000000[6-9]")), job.text)
    os.kill(job.pids[0], signal.SIGKILL)
    assert job.codes() == [-signal.SIGKILL], job.text()
    newest = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    again = warm(start, *settings, f"train.steps={newest + 2}")
    assert again.codes() == [0] and f"resumed after step {newest}" in again.said(0)
    assert not list((tmp_path / "checkpoints").glob(".step_*"))


def one_line(done: Job | subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The command ended with this code and one clear message, without a traceback."""
    ended, said = (done.codes()[0], done.said(0, "stderr")) if isinstance(done, Job) else (done.returncode, done.stderr)
    assert ended == code, (ended, said)
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error:")]) == 1, said
    for part in parts:
        assert part in said


def test_missing_corpus(tmp_path: Path) -> None:
    one_line(call(f"run={tmp_path}/run", f"data.path={tmp_path}/none"), 77, f"{tmp_path}/none", "pretrain.data prepare")


@pytest.mark.parametrize("file", ["train.bin", "train.idx", "validation.bin"])
def test_truncated_data_file(file: str, corpus: Path, tmp_path: Path, start: Jobs) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    path = tmp_path / "data" / file
    os.truncate(path, path.stat().st_size - 2)
    one_line(warm(start, f"run={tmp_path}/run", f"data.path={tmp_path}/data"), 77, file, "bytes")


def test_token_outside_the_vocabulary(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    path = tmp_path / "data" / "train.bin"
    path.write_bytes(b"\xff\xfe" * (path.stat().st_size // 2))
    one_line(
        warm(start, f"run={tmp_path}/run", f"data.path={tmp_path}/data"),
        77,
        "train.bin",
        "outside the vocabulary",
    )


def test_vocabulary_smaller_than_the_tokenizer(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    one_line(
        warm(start, f"run={tmp_path}", f"data.path={corpus}", "model.vocabulary=100"),
        2,
        "model.vocabulary = 100",
        "512",
    )


def test_another_model_at_resume(run: Path, corpus: Path, start: Jobs) -> None:
    done = warm(start, f"run={run}", f"data.path={corpus}", "model.ffns.moe.experts=8")
    one_line(done, 2, "model.ffns.moe.experts", "4", "8", "run folder")


def test_another_data_order_at_resume_unless_allowed(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    shutil.copytree(corpus, tmp_path / "elsewhere")  # the same text in another place is the same data

    def job(*overrides: object) -> Job:
        return warm(start, f"run={tmp_path}/run", *overrides)

    assert job("train.steps=2", f"data.path={corpus}").codes() == [0]
    moved = job(f"data.path={tmp_path}/elsewhere", "train.steps=3")
    assert moved.codes() == [0], moved.text()
    other = (f"data.path={corpus}", "data.seed=5", "train.steps=4")
    one_line(job(*other), 2, "data.seed", "checkpoint.allow_changes")
    allowed = job(*other, "checkpoint.allow_changes=[data.seed]")
    assert allowed.codes() == [0], allowed.text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.dp=2"], "mesh.dp=2, but the launcher started 1"),
        (["train.batch=3", "train.micro_batch=2"], "use train.batch=2 or 4"),
        (["model.mixers.attention.heads=5"], "heads=5 does not divide width=32"),
        (["train.device=cuda"], "device=cuda"),
    ],
)
def test_settings_that_do_not_fit(
    overrides: list[str], message: str, corpus: Path, tmp_path: Path, start: Jobs
) -> None:
    one_line(warm(start, f"run={tmp_path}", f"data.path={corpus}", *overrides), 2, message)


def test_a_layout_that_does_not_fit_ends_before_anybody_waits(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    """One rank of four, alone: it would wait for the others if it asked for them. More such layouts: train/test_sizes.py."""
    done = start(4, [*MAIN[2:], f"run={tmp_path}/run", f"data.path={corpus}", "mesh.tp=4"], ranks=[0])
    one_line(done, 2, "heads=2", "cannot be cut over mesh.tp=4; this model allows mesh.tp 1, 2")
    assert not (tmp_path / "run").exists()


LAUNCHERS = {  # that each starts the job is shown by the commands of README.md
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
}


@pytest.mark.parametrize(
    ("launcher", "code"),  # 1: torchrun's own code for any failure
    [("torchrun", 1), pytest.param("deepspeed", 2, marks=pytest.mark.campaign)],
)
def test_layouts_that_do_not_fit_under_a_launcher(launcher: str, code: int, corpus: Path, tmp_path: Path) -> None:
    done = call(f"run={tmp_path}/run", f"data.path={corpus}", "mesh.tp=3", command=[*LAUNCHERS[launcher], *MAIN[1:]])
    assert done.returncode == code
    assert done.stderr.count("error: mesh: tp=3 does not divide 2 rank(s); start a multiple of 3 ranks, or make") == 1
    assert launcher != "torchrun" or "exitcode  : 2" in done.stderr, done.stderr[-2000:]


def test_dry_run_needs_no_devices_and_any_world_size(corpus: Path, tmp_path: Path, start: Jobs) -> None:
    done = warm(start, f"run={tmp_path}/run", f"data.path={corpus}", "--dry-run", "mesh.dp=4", "train.batch=64")
    assert done.codes() == [0], done.text()
    rows = dict(line.split("  ", 1) for line in done.said(0).splitlines())
    assert "4, torch engine" in rows["ranks"] and "64 sequences of 32" in rows["tokens a step"]
    assert not (tmp_path / "run").exists()
    one_line(
        warm(start, f"run={tmp_path}/run", f"data.path={corpus}", "--dry-run", "mesh.dp=3"),
        2,
        "train.batch = 4",
    )


@pytest.mark.parametrize(
    "command",
    [["pretrain/main.py"], ["-m", "pretrain.data"], ["-m", "pretrain.generate"], ["-m", "pretrain.checkpoint"]],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """--help answers at once because torch, pydantic and the rest are imported only by what needs them."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'datasets', 'megatron', 'rich'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "sys.argv = [sys.argv[1], '--help'] if sys.argv[1] != '-m' else [sys.argv[2], '--help']\n"
        "run = runpy.run_path if sys.argv[0].endswith('.py') else runpy.run_module\n"
        "run(sys.argv[0], run_name='__main__')\n"
    )
    done = call(*command, command=[sys.executable, "-c", code])
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout[-300:]


def test_strict_is_a_setting_of_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.main import main

    for flags, value in (([], "false"), (["--strict"], "true")):
        assert main(["--config", "configs/runs/quickstart.yaml", "--print-config", *flags]) == 0
        assert f"  strict: {value}" in capsys.readouterr().out.splitlines()


def test_unknown_option_is_bad_usage() -> None:
    done = call("--no-such-option")
    assert done.returncode == 2 and "no-such-option" in done.stderr
