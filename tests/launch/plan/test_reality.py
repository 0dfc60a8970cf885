"""The planner against a real run of two ranks on this machine, calibrated by the benchmarks. Wants a calm machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.plan.__main__ import main
from tests.ranks import QUIET, ROOT, launch

RUN: dict[str, Any] = {
    "model": {
        "width": 512,
        "mixers": {"attention": {"kind": "attention", "heads": 8}},
        "ffns": {"swiglu": {"kind": "swiglu", "hidden": 1536}},
        "layers": ["attention + swiglu x3"],
    },
    "data": {"sequence_length": 256},
    "train": {"steps": 12, "batch": 16, "micro_batch": 4, "precision": "fp32", "device": "cpu"},
    "checkpoint": {"every": 1000},
    "validation": {"every": None, "sequences": 1},
    "watchdog": {},
}
ROUNDS = 3
OPS = ("all_reduce", "all_gather", "reduce_scatter")


def calibrate(folder: Path, shapes: str) -> Path:
    """A hardware file of this machine, measured with both ranks at work, as in the run."""
    hardware, results = folder / "here.yaml", folder / "fabric.json"
    section = {"node": {"kind": "switch", "gpus": 2, "gpu_gbs": 1}}
    outputs = [hardware, folder / "other.yaml"]
    for output in outputs:
        chip = {"name": "cpu", "bf16_tflops": 1, "fp32_tflops": 1, "memory_gib": 8, "memory_bandwidth_gbs": 10}
        output.write_text(yaml.safe_dump({**chip, "fabric": section}))
    sizes = ["--arrays", "64M", "--sizes", "512,1024", "--depths", "512", "--shapes", shapes]
    common = ["--device", "cpu", "--threads", "1", "--dtypes", "fp32", *sizes, "--write"]
    commands = [[sys.executable, "-m", "kernels.bench", "hardware", *common, str(output)] for output in outputs]
    environment = {**QUIET, **os.environ}
    both = [subprocess.Popen(c, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) for c in commands]
    assert [process.wait(600) for process in both] == [0, 0]
    bench = launch(["-m", "parallel.bench", *OPS, "--sizes", "64K:64M", "--json", str(results)], 2, timeout=600)
    assert bench.returncode == 0, bench.stderr
    fit = launch(["-m", "parallel.fabric", str(results), "--write-hardware", str(hardware)], None)
    assert fit.returncode == 0, fit.stderr
    return hardware


def predicted(folder: Path, config: Path, hardware: Path, *options: str) -> dict[str, Any]:
    out = folder / "plan.json"
    arguments = ["--config", str(config), "--hardware", str(hardware), "--gpus", "2", "--json", str(out), *options]
    assert main(arguments) == 0
    return json.loads(out.read_text())


def shapes(plan: dict[str, Any]) -> str:
    """The run's own products and those of their backward passes."""
    sizes = set()
    for each in plan["forecast"]["products"]:
        m, n, k = round(each["m"]), each["n"], each["k"]
        sizes |= {(m, n, k), (m, k, n), (k, n, m)}
    return ",".join("x".join(map(str, size)) for size in sorted(sizes))


def measured(config: Path, run: Path) -> list[float]:
    """Seconds of the steps of a real run, without the first ones."""
    done = launch(["pretrain/main.py", "--config", str(config)], 2, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines[4:]]


@pytest.mark.campaign
def test_a_step_of_two_ranks_takes_as_long_as_predicted(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrations and runs in turn: a shared machine's speed drifts by tens of percent within minutes, so each run is held
    against the calibrations just before and after it, and the median of the rounds counts."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as runs and calibrations have it outside of tests

    def config(name: str) -> Path:
        content = {**RUN, "run": str(tmp_path / name), "data": {**RUN["data"], "path": str(corpus)}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    run = config("run0")
    products = shapes(predicted(tmp_path, run, Path(ROOT) / "configs/hardware/h100.yaml"))

    def expected() -> float:
        plan = predicted(tmp_path, run, calibrate(tmp_path, products), "--verbose")
        return plan["forecast"]["seconds"]["step"]

    predictions, errors = [expected()], []
    for i in range(ROUNDS):
        seconds = statistics.median(measured(config(f"run{i}"), tmp_path / f"run{i}"))
        predictions.append(expected())
        errors.append(statistics.mean(predictions[-2:]) / seconds - 1)
        print(
            f"round {i}: predicted {predictions[-2]:.3f} and {predictions[-1]:.3f} s, measured {seconds:.3f} s: {errors[-1]:+.1%}"
        )
    print(f"median {statistics.median(errors):+.1%}")
    assert statistics.median(errors) == pytest.approx(0, abs=0.15)
