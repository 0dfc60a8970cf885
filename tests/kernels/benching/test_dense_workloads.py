"""Attention, experts and the head as they are timed: plain torch computes the same, values and gradients."""

from __future__ import annotations

import pytest
import torch

from kernels import bench
from kernels.benching import dense, measure
from kernels.benching.contenders import ours, peers
from kernels.benching.shapes import Shape, leaves
from kernels.benching.workloads import WORKLOADS

CPU = torch.device("cpu")
SHAPE = Shape(2, 40, 4, 16, 16)


@pytest.mark.parametrize("workload", dense.WORKLOADS, ids=lambda w: w.name)
def test_plain_torch_computes_the_same(workload) -> None:
    inputs = workload.inputs(SHAPE, torch.float32, CPU)
    (form,) = (c for c in ours(workload, SHAPE, torch.float32, CPU, reference=False) if c.objection is None)
    assert form.call is not None
    wanted = form.call(inputs)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(wanted, leaves(inputs), upstream)
    found = peers(workload, SHAPE, CPU, None)
    assert found
    for peer in found:
        assert peer.call is not None and peer.same, peer.objection
        o = peer.call(inputs)
        assert measure.relative_difference(o, wanted) < 1e-6, peer.name
        for x, y in zip(torch.autograd.grad(o, leaves(inputs), upstream), gradients, strict=True):
            assert measure.relative_difference(x, y) < 1e-5, peer.name


def test_inputs_are_those_of_a_layer() -> None:
    inputs = WORKLOADS["attention"].inputs(SHAPE, torch.bfloat16, CPU)
    assert (inputs["q"].shape, inputs["k"].shape) == (
        (2, 40, 4, 16),
        (2, 40, 1, 16),
    )  # four queries' heads share a key's
    assert WORKLOADS["attention"].inputs(Shape(1, 8, 3, 4, 4), torch.float32, CPU)["k"].shape == (1, 8, 3, 4)
    assert WORKLOADS["sliding_attention"].inputs(SHAPE, torch.float32, CPU)["window"] == 10
    assert dense.window(1 << 20) == 512
    routed = WORKLOADS["experts"].inputs(SHAPE, torch.bfloat16, CPU)
    assert (routed["gate_up"].shape, routed["down"].shape) == ((8, 64, 64), (8, 32, 64))
    assert routed["scores"].dtype == torch.float32
    assert routed["scores"].sum(1).allclose(torch.ones(80))
    assert (routed["indices"][:, 0] != routed["indices"][:, 1]).all()
    head = WORKLOADS["linear_cross_entropy"].inputs(SHAPE, torch.bfloat16, CPU)
    assert head["weight"].shape == (4096, 64)
    assert [len(leaves(x)) for x in (inputs, routed, head)] == [3, 4, 2]


def test_a_sliding_window_is_not_the_whole() -> None:
    inputs = WORKLOADS["sliding_attention"].inputs(SHAPE, torch.float32, CPU)
    assert measure.relative_difference(dense.sdpa(inputs | {"window": None}), dense.sdpa(inputs)) > 0.1


def test_the_check_of_forms_covers_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["attention", "experts", "cross_entropy", "--check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(" 0 off")
    for tensor in ("gradient of gate_up", "gradient of scores", "gradient of weight", "gradient of k"):
        assert tensor in out
