"""Measured ceilings: rates between measured shapes by hand, and which figure a run's mfu_measured is against."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.estimate import hardware
from pretrain.estimate.hardware import Hardware, ceiling
from pretrain.estimate.measured import Measured

CPU = torch.device("cpu")


def _measured(**more: object) -> Measured:
    return Measured.model_validate({"date": datetime.date(2026, 11, 21), "device": "X", "torch": "2", **more})


def test_ceilings_and_bandwidth() -> None:
    measured = _measured(matmul_tflops={"bf16": 600.5}, memory_gbs={"copy": 4000.0, "triad": 3900.0})
    assert measured.peak("bf16") == 600.5e12
    assert measured.peak("fp32") is None
    assert measured.bandwidth() == 3900e9
    assert _measured(memory_gbs={"copy": 4000.0, "dot": 4100.0}).bandwidth() == 4100e9
    assert _measured().bandwidth() is None


def test_rates_between_measured_shapes() -> None:
    rows = [[1024, 1024, 1024, "bf16", "nt", 100.0], [4096, 1024, 1024, "bf16", "nt", 300.0]]
    rows += [[1024, 1024, 1024, "fp32", "nt", 1.0]]
    measured = _measured(matmul=rows, matmul_tflops={"fp16": 7.0})
    assert measured.rate(1024, 1024, 1024, "bf16") == pytest.approx(100e12)
    assert measured.rate(4096, 1024, 1024, "bf16", "nt") == pytest.approx(300e12)
    # Half way in logarithms: equal weights, harmonic mean.
    assert measured.rate(2048, 1024, 1024, "bf16") == pytest.approx(150e12)
    # Distances 1 and 3: weights 1 and 1/9.
    assert measured.rate(512, 1024, 1024, "bf16") == pytest.approx(1e12 * (10 / 9) / (1 / 100 + 1 / 2700))
    assert measured.rate(64, 64, 64, "fp16") == 7e12  # no rows of it: the ceiling
    assert measured.rate(64, 64, 64, "bf16", "tn") is None


def test_layouts_take_turns() -> None:
    rows = [[64, 64, 64, "bf16", layout, rate] for layout, rate in (("nn", 100.0), ("nt", 200.0), ("tn", 400.0))]
    measured = _measured(matmul=rows)
    assert measured.rate(64, 64, 64, "bf16", "tn") == pytest.approx(400e12)
    assert measured.rate(64, 64, 64, "bf16") == pytest.approx(3e12 / (1 / 100 + 1 / 200 + 1 / 400))


def test_only_the_four_nearest_shapes_count() -> None:
    rows = [[2**p, 64, 64, "bf16", "nt", 10.0 if p < 8 else 1.0] for p in range(4, 12)]
    assert _measured(matmul=rows).rate(48, 64, 64, "bf16") == pytest.approx(10e12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"matmul": [[0, 1, 1, "bf16", "nt", 1.0]]},
        {"matmul": [[1, 1, 1, "bf16", "tt", 1.0]]},
        {"matmul_tflops": {"bf16": 0.0}},
        {"memory_gbs": {"scale": 1.0}},
        {"peak": 3},
    ],
)
def test_a_wrong_section_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        _measured(**wrong)


def _chip(device: str, threads: int | None) -> Hardware:
    measured = _measured(device=device, threads=threads, matmul_tflops={"bf16": 0.25})
    return Hardware(name="X", bf16_tflops=1, fp32_tflops=1, memory_gib=1, memory_bandwidth_gbs=1, measured=measured)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> tuple[str, int | None]:
    monkeypatch.setattr(hardware, "measured_peak", lambda device, precision: 7e9)
    return hardware._identity(CPU)


def test_the_files_ceiling_is_used_on_the_device_that_it_is_of(here: tuple[str, int]) -> None:
    name, threads = here
    assert threads == torch.get_num_threads()
    assert ceiling(_chip(name, threads), CPU, "bf16") == (0.25e12, None)


def test_otherwise_it_is_measured_now(here: tuple[str, int]) -> None:
    name, threads = here
    assert ceiling(None, CPU, "bf16") == (7e9, None)
    assert ceiling(_chip(name, threads), CPU, "fp32") == (7e9, None)  # the file has bf16 only
    plain = Hardware(name="X", bf16_tflops=1, fp32_tflops=1, memory_gib=1, memory_bandwidth_gbs=1)
    assert ceiling(plain, CPU, "bf16") == (7e9, None)
    peak, objection = ceiling(_chip("Other", None), CPU, "bf16")
    assert (peak, objection) == (
        7e9,
        f"the measured ceilings are of Other, this is {name} with {threads} threads: measured anew",
    )
    peak, objection = ceiling(_chip(name, threads + 1), CPU, "bf16")
    assert peak == 7e9
    assert objection is not None and f"of {name} with {threads + 1} threads, this is" in objection


def test_a_run_takes_the_ceiling_of_the_file_that_it_names(here: tuple[str, int], tmp_path: Path) -> None:
    from pretrain.train.loop import _peaks

    path = tmp_path / "chip.yaml"
    config = SimpleNamespace(hardware=path, train=SimpleNamespace(precision="bf16"))
    run = SimpleNamespace(processes=SimpleNamespace(device=CPU), config=config)
    path.write_text(json.dumps(_chip(*here).model_dump(mode="json")))
    assert _peaks(run) == (1e12, 0.25e12, None)  # type: ignore[arg-type]
    path.write_text(json.dumps(_chip("Other", 3).model_dump(mode="json")))
    nominal, measured, objection = _peaks(run)  # type: ignore[arg-type]
    assert (nominal, measured) == (1e12, 7e9)
    assert objection is not None
    assert objection.startswith(f"mfu_measured: {path}: the measured ceilings are of Other with 3 threads, this is ")
    config.hardware = None
    assert _peaks(run) == (None, 7e9, None)  # type: ignore[arg-type]
