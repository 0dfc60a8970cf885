"""Hardware files, and the peak that is measured where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.estimate.hardware import FOLDER, detect, measured_peak, read
from pretrain.exit import Exit


def test_every_hardware_file_is_valid_and_names_are_distinct() -> None:
    chips = [read(path) for path in sorted(FOLDER.glob("*.yaml"))]
    assert {"NVIDIA H200", "AMD Instinct MI300X"} <= {chip.name for chip in chips}
    assert read(FOLDER / "h200.yaml").peak("bf16") == 989e12
    assert detect(torch.device("cpu")) is None


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("name: x", "not a hardware file")])
def test_a_wrong_hardware_file_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chip.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Exit, match=message) as caught:
        read(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_measuring_the_peak_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), "fp32") > 1e9
    assert torch.equal(before, torch.get_rng_state())
