"""The command as a user meets it: options, tables, files, Ctrl-C, wrong answers. No test depends on how fast anything is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import bench
from kernels.benching.hardware import arguments, bandwidth, command, matmul, plot, progress
from kernels.benching.hardware.clock import Clock
from kernels.benching.hardware.dtypes import Kind
from pretrain.estimate.hardware import read

SMALL = ["hardware", "--device", "cpu", "--arrays", "4K,64K", "--sizes", "16:32", "--depths", "16,32", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.benching.hardware.clock.SHORTEST", 1e-4)


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    result, picture, chip = tmp_path / "chip.json", tmp_path / "chip.svg", tmp_path / "chip.yaml"
    asked = ["--shapes", "48x16x64", "--json", str(result), "--plot", str(picture), "--write", str(chip)]
    assert bench.main([*SMALL, *asked]) == 0
    out = capsys.readouterr().out
    for text in (
        "copy",
        "largest array",
        "4 KiB",
        "64 KiB",
        "bf16, K = 16",
        "fp32, K = 32",
        "48x16x64",
        "half of all from",
    ):
        assert text in out
    content = json.loads(result.read_text())
    assert content["complete"] is True
    assert content["conditions"]["command"].startswith("python -m kernels.bench hardware --device cpu --arrays 4K,64K")
    assert {"processor", "torch", "threads", "load", "load_after", "commit", "environment"} <= set(
        content["conditions"]
    )
    assert [(r["op"], r["array_bytes"]) for r in content["memory"]["rows"]] == [
        (op, size) for size in (4096, 65536) for op in bandwidth.ARRAYS
    ]
    rows = content["matmul"]["rows"]
    assert len(rows) == 2 * 3 * (2 * 2 * 2 + 1)  # dtypes, layouts, the grid and the shape that was asked for
    assert all(len(r["seconds"]) == 2 and r["note"] is None for r in rows)
    best = max(r["tflops"] for r in rows if r["dtype"] == "bf16")
    assert content["matmul"]["ceilings"]["bf16"]["tflops"] == best
    assert "<svg" in picture.read_text()
    measured = read(chip).measured
    assert measured is not None
    assert measured.peak("bf16") == pytest.approx(best * 1e12, rel=1e-3)
    assert len(measured.matmul) == len(rows)
    assert measured.threads == torch.get_num_threads()
    assert measured.memory_gbs["add"] == pytest.approx(content["memory"]["ceilings_gbs"]["add"], rel=1e-3)


def test_a_file_that_cannot_be_written_in_the_end_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = tmp_path / "chip.yaml"
    multiply = Kind.multiply

    def lacking(self: Kind, *operands: Any) -> torch.Tensor:
        if self.name == "bf16":
            raise RuntimeError("no such instruction")
        return multiply(self, *operands)

    monkeypatch.setattr(Kind, "multiply", lacking)
    assert bench.main([*SMALL, "--write", str(chip)]) == 1
    said = capsys.readouterr()
    assert f"a new file needs bf16 and fp32, and no product in bf16 ran; {chip} was not written" in said.err
    assert "did not run: no such instruction" in said.out
    assert not chip.exists()


def test_one_part_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["hardware", "memory", "--device", "cpu", "--arrays", "4K", "--rounds", "2"]) == 0
    assert "TFLOP/s" not in capsys.readouterr().out
    words = [
        "matmul",
        "--device",
        "cpu",
        "--sizes",
        "none",
        "--shapes",
        "16x16x16",
        "--layouts",
        "nt",
        "--dtypes",
        "fp32",
    ]
    assert bench.main(["hardware", *words, "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "Memory" not in out
    assert "16x16x16" in out


def test_ctrl_c_leaves_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, chip = tmp_path / "chip.json", tmp_path / "chip.yaml"
    time, left = Clock.time, [14]

    def interrupted(self: Clock, *args: object, **more: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return time(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Clock, "time", interrupted)
    assert bench.main([*SMALL, "--json", str(result), "--write", str(chip)]) == 130
    said = capsys.readouterr()
    assert f"interrupted: these are the results so far; {chip} was not written" in said.err
    assert "largest array" in said.out
    assert "Ceilings" in said.out
    content = json.loads(result.read_text())
    assert content["complete"] is False
    assert (len(content["memory"]["rows"]), len(content["matmul"]["rows"])) == (10, 4)
    assert not chip.exists()
    left[0] = 0  # before anything was measured
    assert bench.main([*SMALL, "--json", str(result)]) == 130
    assert json.loads(result.read_text())["memory"]["rows"] == []


def test_a_wrong_answer_is_an_error_and_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = tmp_path / "chip.yaml"
    monkeypatch.setattr(matmul, "_error", lambda a, b, result: 0.5 if a.shape[0] == 32 else 0.0)
    assert bench.main([*SMALL, "--dtypes", "bf16,fp32", "--layouts", "nt", "--write", str(chip)]) == 1
    said = capsys.readouterr()
    assert f"8 answers are WRONG; {chip} was not written" in said.err
    assert "WRONG: off by 5.0e-01 of its size" in said.out
    assert not chip.exists()
    monkeypatch.setattr(
        bandwidth.Arrays, "wrong", lambda self, op, call: "3 of 8 elements of add are wrong" if op == "add" else ""
    )
    assert bench.main(["hardware", "memory", "--device", "cpu", "--arrays", "4K", "--rounds", "2"]) == 1
    assert "WRONG: 3 of 8 elements of add are wrong (arrays of 4 KiB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "'disk' is unknown; choose among memory, matmul"),
        (["--dtypes", "bf16,int4"], "'int4' is unknown; choose among bf16, fp16, fp32, tf32, fp8"),
        (["--dtypes", "tf32"], "tf32 is a mode of NVIDIA GPUs"),
        (["--layouts", "tt"], "--layouts: 'tt' is unknown; choose among nn, nt, tn"),
        (["--sizes", "4096:512"], "the range '4096:512' must go up"),
        (["--sizes", "big"], "--sizes: 'big' is not a size; write a number such as 4096"),
        (["--sizes", "none"], "--sizes none leaves nothing to multiply: give --shapes"),
        (["--depths", "0"], "--depths: '0' is not a size"),
        (["--shapes", "12x13"], "'12x13' is not the shape of a product; write MxNxK"),
        (["--arrays", "1"], "an array has 4K to 8G bytes"),
        (["--arrays", "4097"], "a multiple of 8"),
        (["--arrays", "1M:2M:1"], "by a factor of at least 2"),
        (["memory", "--dtypes", "bf16"], "--dtypes belongs to matmul, which is not measured here"),
        (["matmul", "--arrays", "1M"], "--arrays belongs to memory, which is not measured here"),
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--blas", "cublaslt"], "--blas: 'cublaslt' is unknown; choose among default, blas, onednn"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--plot", "/no/such/folder/x.png"], "there is no folder /no/such/folder"),
        (["--plot", "x.txt"], "the name must end in one of .png, .svg, .pdf"),
        (["memory", "--write", "x.yaml"], "--write needs ceilings: measure memory and matmul"),
        (["--sizes", "none", "--shapes", "8x8x8", "--write", "x.yaml"], "do not leave the grid out"),
        (["--dtypes", "bf16", "--write", "/tmp/no-such-file-here.yaml"], "a new file needs bf16 and fp32"),
    ],
)
def test_bad_usage_is_told_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["hardware", "--device", "cpu", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_arrays_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.machine, "free_bytes", lambda device: 2 << 30)
    with pytest.raises(SystemExit):
        bench.main(["hardware", "--device", "cpu", "--arrays", "1G"])
    assert "three arrays of 1 GiB do not fit into the 2 GiB that are free" in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main(["hardware", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "no CUDA or ROCm device is visible: use --device cpu" in capsys.readouterr().err


def test_hardware_must_be_the_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["kda", "hardware"])
    assert "python -m kernels.bench hardware [options]" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["hardware", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "python -m kernels.bench hardware --write configs/hardware/mi300x.yaml" in out


def test_lists_and_ranges() -> None:
    assert arguments.integers("--x", "64K:2M", factor=4) == [65536, 262144, 1048576]
    assert arguments.integers("--x", "1k:8K:8,3,1G", factor=2) == [3, 1024, 8192, 1 << 30]
    assert arguments.integers("--x", "5MiB", factor=2) == [5 << 20]
    assert arguments.names("--x", "b,a,b", "abc") == ["b", "a"]
    assert arguments.names("--x", ["b", "c,a"], "abc") == ["b", "c", "a"]
    for text in ("", "1:2:3:4", "1T", "-3", "1.5K"):
        with pytest.raises(ValueError, match="--x"):
            arguments.integers("--x", text, factor=2)
    with pytest.raises(ValueError, match="no name is given"):
        arguments.names("--x", ",", "abc")


def test_progress_rewrites_a_terminals_line_and_is_rare_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "12")
    terminal = Terminal()
    line = progress.Progress(terminal)
    line.say("a line that is too long")
    line.clear()
    assert terminal.getvalue() == "\r\x1b[Ka line that\r\x1b[K"
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    line = progress.Progress(file)
    for _ in range(20):
        now[0] += 1.0
        line.say(f"at {now[0]:.0f}")
    line.clear()
    assert file.getvalue() == "at 115\n"


def test_heat_maps_hold_the_best_of_the_layouts() -> None:
    from tests.kernels.benching.hardware_rows import product

    rows = [product(m, n, 8, 1.0 + m + n) for m in (1, 2) for n in (1, 2)]
    rows += [product(1, 1, 8, 9.0, layout="tn"), product(2, 2, 8, 99.0, note="WRONG"), product(5, 5, 16, 1.0)]
    (only,) = plot.heat(rows, "bf16").items()
    assert only == (
        8,
        {
            (1, 1): pytest.approx(9.0),
            (1, 2): pytest.approx(4.0),
            (2, 1): pytest.approx(4.0),
            (2, 2): pytest.approx(5.0),
        },
    )


def test_a_busy_machine_is_told() -> None:
    busy = {"device": "cpu", "load": [1.5, 0.0, 0.0], "cores": 2}
    (line,) = command._busy(busy)
    assert line.startswith("the machine is busy (load 1.5 on 2 cores)")
    assert command._busy(busy | {"cores": 8}) == command._busy(busy | {"device": "NVIDIA H200"}) == []
