"""The fabric's rules against hand calculations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from parallel.fabric.topology import OPS, Fabric, factor
from pretrain.estimate.hardware import read

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "hardware"


def shipped(name: str) -> Fabric:
    fabric = read(CONFIGS / f"{name}.yaml").fabric
    assert fabric is not None
    return fabric


def ideal(**changes: Any) -> Fabric:
    """A mesh without latencies and losses."""
    section = {
        "node": {"kind": "xgmi_mesh", "gpus": 8, "link_gbs": 64, "hop_us": 0},
        "network": {"nics": 8, "nic_gbits": 400, "hop_us": 0},
        "launch_us": 0,
    }
    return Fabric.model_validate({**section, **changes})


@pytest.mark.parametrize(("ranks", "expected"), [(2, 64.0), (4, 192.0), (8, 448.0)])
def test_a_gpu_of_a_mesh_has_n_minus_1_links(ranks: int, expected: float) -> None:
    """Equation 1 of arXiv 2511.17127."""
    fabric = shipped("mi300x")
    for op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
        assert fabric.ceiling(op, ranks, ranks) == expected
    assert fabric.ceiling("send_recv", 2, 2) == 64.0


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_switch_gives_every_group_the_same(name: str) -> None:
    assert [shipped(name).ceiling("all_reduce", ranks, ranks) for ranks in (2, 4, 8)] == [450.0] * 3


def test_between_nodes_the_cards_decide() -> None:
    fabric = shipped("mi300x")
    assert fabric.ceiling("all_gather", 1024, 8) == 400.0  # eight rails of 50 GB/s, below 448 inside
    assert fabric.ceiling("all_reduce", 128, 1) == 50.0  # one rank a node: one card
    assert fabric.ceiling("all_reduce", 4, 2) == 64.0  # two cards of 50, but one link between the two inside
    assert fabric.ceiling("all_reduce", 8, 4) == 192.0
    assert fabric.ceiling("send_recv", 2, 1) == 50.0
    # 8 of 15 partners are in the other node: 8 shards over one card for 15 shards of algorithm's traffic
    assert fabric.ceiling("all_to_all", 16, 8) == pytest.approx(15 / 8 * 50)
    assert fabric.ceiling("all_reduce", 1, 1) == math.inf


def test_cards_that_gpus_share() -> None:
    fabric = ideal(network={"nics": 2, "nic_gbits": 400})
    assert fabric.ceiling("all_gather", 16, 8) == 8 * 50 / 4
    assert fabric.ceiling("send_recv", 2, 1) == 50 / 4


def test_seconds_of_a_known_job() -> None:
    """The parameters of ZAYA1-8B in bf16 over 128 nodes of 8: 44 ms (400 GB/s), the gradients in fp32 twice that."""
    fabric = ideal()
    share = 1023 / 1024
    assert fabric.seconds("all_gather", 2 * 8.84e9, 1024, 8) == pytest.approx(0.0442 * share, rel=1e-9)
    assert fabric.seconds("reduce_scatter", 4 * 8.84e9, 1024, 8) == pytest.approx(0.0884 * share, rel=1e-9)
    assert fabric.seconds("all_reduce", 448e9, 8, 8) == pytest.approx(2 * 7 / 8, rel=1e-9)
    assert fabric.seconds("all_reduce", 1e9, 1, 1) == 0.0


def test_latency_counts_steps() -> None:
    fabric = ideal(
        node={"kind": "switch", "gpu_gbs": 450, "hop_us": 2}, network={"nic_gbits": 400, "hop_us": 5}, launch_us=10
    )

    def microseconds(op: str, ranks: int, near: int) -> float:
        return 1e6 * fabric.seconds(op, 0, ranks, near)

    assert microseconds("all_reduce", 8, 8) == pytest.approx(10 + 14 * 2)
    assert microseconds("all_gather", 8, 8) == pytest.approx(10 + 7 * 2)
    assert microseconds("all_reduce", 1024, 8) == pytest.approx(
        10 + 14 * 2 + 14 * 5
    )  # a tree over 128 nodes, both ways
    assert microseconds("all_gather", 1024, 8) == pytest.approx(10 + 7 * 2 + 127 * 5)  # a ring
    assert microseconds("all_to_all", 16, 8) == pytest.approx(10 + 2 + 5)
    assert microseconds("send_recv", 2, 1) == pytest.approx(10 + 5)
    assert microseconds("broadcast", 32, 8) == pytest.approx(10 + 7 * 2 + 2 * 5)


def test_efficiency_slows_but_does_not_lower_the_ceiling() -> None:
    node = {"kind": "switch", "gpu_gbs": 400, "hop_us": 0}
    fabric = ideal(node={**node, "efficiency": 0.5})
    assert fabric.ceiling("all_gather", 8, 8) == 400.0
    assert fabric.seconds("all_gather", 1e9, 8, 8) == pytest.approx(7 / 8 / 200)


def test_what_was_measured_takes_the_place_of_the_rule() -> None:
    curve = {"op": "all_reduce", "ranks": 2, "ranks_in_node": 2, "alpha_us": 100, "busbw_gbs": 2}
    fabric = ideal(measured=[curve])
    assert fabric.seconds("all_reduce", 4e6, 2, 2) == pytest.approx(100e-6 + 4e6 / 2e9)
    assert fabric.seconds("all_reduce", 4e6, 2, 8) == fabric.seconds(
        "all_reduce", 4e6, 2, 2
    )  # two of a node, however many fit
    assert fabric.seconds("all_gather", 64e9, 2, 2) == pytest.approx(0.5)
    assert fabric.seconds("all_reduce", 50e9, 2, 1) == pytest.approx(1.0)  # over two nodes: the rule


@pytest.mark.parametrize("op", OPS)
def test_seconds_and_ceiling_agree_where_nothing_is_lost(op: str) -> None:
    fabric = ideal()
    for ranks, near in ((2, 2), (8, 8), (2, 1), (16, 8), (24, 4)):
        busbw = 1e9 * factor(op, ranks) / fabric.seconds(op, 1e9, ranks, near) / 1e9
        assert busbw == pytest.approx(fabric.ceiling(op, ranks, near))


def test_factors_of_nccl_tests() -> None:
    assert factor("all_reduce", 8) == 1.75
    assert factor("all_gather", 8) == factor("reduce_scatter", 8) == factor("all_to_all", 8) == 0.875
    assert factor("broadcast", 8) == factor("send_recv", 2) == factor("reduce", 4) == 1.0
    assert factor("all_reduce", 1) == 0.0


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (("all_redcue", 2, 2), ("'all_redcue'", "did you mean 'all_reduce'?", "send_recv")),
        (("all_reduce", 16, 16), ("16 ranks in a node", "fabric.node.gpus is 8")),
        (("all_reduce", 0, 1), ("0 ranks",)),
        (("all_reduce", 4, 0), ("0 ranks in a node",)),
    ],
)
def test_what_no_fabric_has(call: tuple[str, int, int], parts: tuple[str, ...]) -> None:
    for error in (lambda: ideal().ceiling(*call), lambda: ideal().seconds(call[0], 1.0, *call[1:])):
        with pytest.raises(ValueError) as caught:
            error()
        assert all(part in str(caught.value) for part in parts)


def test_nodes_that_nothing_joins() -> None:
    fabric = ideal(network=None)
    assert fabric.ceiling("all_reduce", 8, 8) == 448
    with pytest.raises(ValueError, match=r"add fabric\.network"):
        fabric.seconds("all_reduce", 1e6, 16, 8)


def test_a_section_is_strict() -> None:
    with pytest.raises(ValidationError, match="did you mean 'link_gbs'"):
        ideal(node={"kind": "xgmi_mesh", "link_gps": 64})
    with pytest.raises(ValidationError, match="no collective is named 'all_sum'"):
        ideal(measured=[{"op": "all_sum", "ranks": 2, "ranks_in_node": 2, "alpha_us": 1, "busbw_gbs": 2}])


def test_shipped_files_say_what_the_data_sheets_say() -> None:
    for name in ("mi300x", "h100", "h200"):
        section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["fabric"]
        assert section["network"] == {"nics": 8, "nic_gbits": 400, "rails": True}
        assert section["node"]["gpus"] == 8
