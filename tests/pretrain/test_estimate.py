"""FLOPs, contexts, hardware files, and the report of --dry-run by hand counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.estimate.flops import Utilization, mean_context, training_flops_per_token
from pretrain.estimate.hardware import FOLDER, detect, measured_peak, read
from pretrain.exit import Exit
from tests.pretrain.small import decoder


def test_mean_context_by_hand() -> None:
    assert mean_context([4]) == (1 + 2 + 3 + 4) / 4
    assert mean_context([1, 3]) == (1 + 1 + 2 + 3) / 4
    assert mean_context([]) == 0.0


def test_backward_costs_two_forwards() -> None:
    model = decoder()
    assert training_flops_per_token(model, 10.0) == 3 * model.flops_per_token(10.0)


def test_a_share_of_more_than_the_whole_is_a_warning_and_no_number() -> None:
    utilization = Utilization(100e12, "mi300x.yaml")
    assert utilization.of(40e12) == (0.4, None) and utilization.of(100e12) == (1.0, None)
    share, warning = utilization.of(250e12)
    assert share is None and warning is not None
    assert "250 TFLOP/s" in warning and "100 TFLOP/s that mi300x.yaml says" in warning
    assert utilization.of(250e12) == (None, None)  # said once
    assert Utilization(None, "").of(1e12) == (None, None)


def test_matrix_products_are_counted_as_torch_counts_them() -> None:
    """Of the parts that torch's counter can see: every projection, attention's products and the head."""
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder(layers=["attention + swiglu x2"]).eval()
    T = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.int64))
    counted = counter.get_total_flops() / T
    projections = model.flops_per_token(0.0)
    assert (
        projections <= counted <= model.flops_per_token(T)
    )  # torch counts the masked half of attention, or none of it


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
