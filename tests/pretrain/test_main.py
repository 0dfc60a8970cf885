"""The training command as people start it: every launcher, exit codes, signals, and what can be wrong with a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pretrain.train.small_run import SETTINGS, losses
from tests.ranks import QUIET, ROOT

MAIN = [sys.executable, "pretrain/main.py", "--config", "configs/runs/quickstart.yaml", *SETTINGS]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**QUIET, **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def call(
    *arguments: object, command: list[str] = MAIN, timeout: float = 300, started: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """started: what a launcher says in the environment."""
    line, environment = [*command, *map(str, arguments)], {**ENVIRONMENT, **(started or {})}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


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


def test_a_finished_run_started_again_does_nothing_more(run: Path, corpus: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    done = call(f"run={run}", f"data.path={corpus}")
    assert done.returncode == 0 and "resumed after step 6" in done.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_generate_and_load_use_the_run(run: Path) -> None:
    command = [sys.executable, "-m", "pretrain.generate", "--checkpoint", str(run), "--tokens", "20", "--seed", "3"]
    first, again = (call("--prompt", "def ", command=command) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ") and first.stdout == again.stdout
    code = (
        "import sys, torch; from pretrain import load; model, tokenizer = load(sys.argv[1]); "
        "ids = torch.tensor([[tokenizer.bos, *tokenizer.encode('import os')]]); logits = model(ids); "
        "print(logits.dtype, logits.shape[0] == 1, logits.shape[1] == ids.shape[1], logits.shape[2] == 512)"
    )
    loaded = call(str(run), command=[sys.executable, "-c", code])
    assert loaded.stdout.split() == ["torch.float32", "True", "True", "True"], loaded.stderr


LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
    # --multi_gpu is its word for several processes; without a GPU they compute on the CPU.
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_starts_the_same_job(launcher: str, run: Path, corpus: Path, tmp_path: Path) -> None:
    engine = "deepspeed" if launcher == "deepspeed" else "torch"
    command = [*LAUNCHERS[launcher], *MAIN[1:]]
    done = call(f"run={tmp_path}", f"data.path={corpus}", f"engine.kind={engine}", command=command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dp 2 = 2 rank(s)" in done.stdout
    assert losses(tmp_path) == pytest.approx(losses(run), rel=1e-2)  # bf16: a rounding may choose another expert


def test_sigterm_saves_and_exits_75_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    arguments = [
        f"run={tmp_path}",
        f"data.path={corpus}",
        "checkpoint.every=100000",
        "train.steps=100000",
        "log.every=1",
    ]
    process = subprocess.Popen([*MAIN, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and "loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 75
    assert "stopped by SIGTERM" in rest
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert len(losses(tmp_path)) == step
    done = call(*arguments, f"train.steps={step + 2}")
    assert done.returncode == 0 and f"resumed after step {step}" in done.stdout
    assert len(losses(tmp_path)) == step + 2


def test_kill_leaves_the_last_checkpoint_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    arguments = [f"run={tmp_path}", f"data.path={corpus}", "checkpoint.every=2", "train.steps=100000"]
    process = subprocess.Popen([*MAIN, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("step_0000000[6-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    newest = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    done = call(*arguments, f"train.steps={newest + 2}")
    assert done.returncode == 0 and f"resumed after step {newest}" in done.stdout
    assert not list((tmp_path / "checkpoints").glob(".step_*"))


def one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The command ended with this code and one clear message, without a traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_missing_corpus(tmp_path: Path) -> None:
    one_line(call(f"run={tmp_path}/run", f"data.path={tmp_path}/none"), 77, f"{tmp_path}/none", "pretrain.data prepare")


@pytest.mark.parametrize("file", ["train.bin", "train.idx", "validation.bin"])
def test_truncated_data_file(file: str, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    path = tmp_path / "data" / file
    os.truncate(path, path.stat().st_size - 2)
    one_line(call(f"run={tmp_path}/run", f"data.path={tmp_path}/data"), 77, file, "bytes")


def test_token_outside_the_vocabulary(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    path = tmp_path / "data" / "train.bin"
    path.write_bytes(b"\xff\xfe" * (path.stat().st_size // 2))
    one_line(call(f"run={tmp_path}/run", f"data.path={tmp_path}/data"), 77, "train.bin", "outside the vocabulary")


def test_vocabulary_smaller_than_the_tokenizer(corpus: Path, tmp_path: Path) -> None:
    one_line(call(f"run={tmp_path}", f"data.path={corpus}", "model.vocabulary=100"), 2, "model.vocabulary = 100", "512")


def test_another_model_at_resume(run: Path, corpus: Path) -> None:
    done = call(f"run={run}", f"data.path={corpus}", "model.ffns.moe.experts=8")
    one_line(done, 2, "model.ffns.moe.experts", "4", "8", "run folder")


def test_another_data_order_at_resume_unless_allowed(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "elsewhere")  # the same text in another place is the same data
    arguments = (f"run={tmp_path}/run", "train.steps=2")
    assert call(*arguments, f"data.path={corpus}").returncode == 0
    moved = call(*arguments, f"data.path={tmp_path}/elsewhere", "train.steps=3")
    assert moved.returncode == 0, moved.stderr
    refused = call(f"run={tmp_path}/run", f"data.path={corpus}", "data.seed=5", "train.steps=4")
    one_line(refused, 2, "data.seed", "checkpoint.allow_changes")
    allowed = call(
        f"run={tmp_path}/run",
        f"data.path={corpus}",
        "data.seed=5",
        "train.steps=4",
        "checkpoint.allow_changes=[data.seed]",
    )
    assert allowed.returncode == 0, allowed.stderr


def test_run_folder_in_use(corpus: Path, tmp_path: Path) -> None:
    arguments = [f"run={tmp_path}", f"data.path={corpus}", "train.steps=100000", "log.every=1"]
    process = subprocess.Popen([*MAIN, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        holder = json.loads((tmp_path / "lease.json").read_text())["pid"]
        assert Path(f"/proc/{holder}/stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)  # its child
        one_line(call(*arguments), 1, str(tmp_path), f"process {holder} ")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.dp=2"], "mesh.dp=2, but the launcher started 1"),
        (["train.batch=3", "train.micro_batch=2"], "use train.batch=2 or 4"),
        (["model.mixers.attention.heads=5"], "heads=5 does not divide width=32"),
        (["train.device=cuda"], "device=cuda"),
    ],
)
def test_settings_that_do_not_fit(overrides: list[str], message: str, corpus: Path, tmp_path: Path) -> None:
    one_line(call(f"run={tmp_path}", f"data.path={corpus}", *overrides), 2, message)


def test_a_layout_that_does_not_fit_ends_before_anybody_waits(corpus: Path, tmp_path: Path) -> None:
    """One rank of four, alone: it would wait for the others if it asked for them. More such layouts: train/test_sizes.py."""
    started = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = call(f"run={tmp_path}/run", f"data.path={corpus}", "mesh.tp=4", started=started, timeout=120)
    one_line(done, 2, "heads=2", "cannot be cut over mesh.tp=4; this model allows mesh.tp 1, 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launcher", "code"), [("torchrun", 1), ("deepspeed", 2)]
)  # torchrun's own code for any failure
def test_layouts_that_do_not_fit_under_a_launcher(launcher: str, code: int, corpus: Path, tmp_path: Path) -> None:
    done = call(f"run={tmp_path}/run", f"data.path={corpus}", "mesh.tp=3", command=[*LAUNCHERS[launcher], *MAIN[1:]])
    assert done.returncode == code
    assert done.stderr.count("error: mesh: tp=3 does not divide 2 rank(s); start a multiple of 3 ranks, or make") == 1
    assert launcher != "torchrun" or "exitcode  : 2" in done.stderr, done.stderr[-2000:]


def test_dry_run_needs_no_devices_and_any_world_size(corpus: Path, tmp_path: Path) -> None:
    done = call(f"run={tmp_path}/run", f"data.path={corpus}", "--dry-run", "mesh.dp=4", "train.batch=64")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert "4, torch engine" in rows["ranks"] and "64 sequences of 32" in rows["tokens a step"]
    assert not (tmp_path / "run").exists()
    one_line(call(f"run={tmp_path}/run", f"data.path={corpus}", "--dry-run", "mesh.dp=3"), 2, "train.batch = 4")


@pytest.mark.parametrize(
    "command",
    [["pretrain/main.py"], ["-m", "pretrain.data"], ["-m", "pretrain.generate"], ["-m", "pretrain.checkpoint"]],
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """--help answers at once because torch, pydantic and the rest are imported only by what needs them."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help'] if sys.argv[1] != '-m' else [sys.argv[2], '--help']\n"
        "try:\n"
        "    run = runpy.run_path if sys.argv[0].endswith('.py') else runpy.run_module\n"
        "    run(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'pydantic', 'numpy', 'datasets', 'megatron', 'rich'}\n"
        "    print('heavy:', sorted(heavy & set(sys.modules)), stop.code)\n"
    )
    done = call(*command, command=[sys.executable, "-c", code])
    assert "usage:" in done.stdout and done.stdout.splitlines()[-1] == "heavy: [] 0", done.stdout[-300:] + done.stderr


def test_strict_is_a_setting_of_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.main import main

    for flags, value in (([], "false"), (["--strict"], "true")):
        assert main(["--config", "configs/runs/quickstart.yaml", "--print-config", *flags]) == 0
        assert f"  strict: {value}" in capsys.readouterr().out.splitlines()


def test_unknown_option_is_bad_usage() -> None:
    done = call("--no-such-option")
    assert done.returncode == 2 and "no-such-option" in done.stderr
