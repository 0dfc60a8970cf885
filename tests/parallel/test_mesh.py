"""The process grid: the groups of megatron-core, groups that talk to the right ranks, sizes that do not fit, and the picture."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import mesh as module
from parallel.drawing import draw, line
from parallel.grid import AXES, Grid, MeshConfig, layouts
from parallel.mesh import Mesh
from parallel.processes import Processes
from tests.parallel import mesh_ranks
from tests.ranks import run_ranks

WORLDS = (1, 2, 4, 6, 8, 12, 16, 30, 32, 48, 64)


def grids(world: int, **limits: Any) -> list[Grid]:
    return [config.grid(world) for config in layouts(world, **limits)]


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("world", WORLDS)
def test_groups_are_those_of_megatron_core(world: int) -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    for grid in grids(world, replicate=1):
        order = "tp-cp-ep-dp-pp"
        dense = state.RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order=order)
        expert_tp = grid.tp if grid.expert_tensor else 1
        expert_dp = world // (grid.pp * grid.ep * expert_tp)
        expert = state.RankGenerator(tp=expert_tp, ep=grid.ep, dp=expert_dp, pp=grid.pp, cp=1, order=order)
        theirs = {axis: dense.get_ranks(axis) for axis in ("pp", "dp", "cp", "tp")}
        theirs |= {"dp_cp": dense.get_ranks("dp-cp"), "dp_cp_tp": dense.get_ranks("tp-dp-cp")}
        theirs |= {"ep": expert.get_ranks("ep"), "edp": expert.get_ranks("dp")}
        for axis, groups in theirs.items():
            assert sorted(grid.groups(axis)) == sorted(groups), (grid, axis)


@pytest.mark.parametrize("world", WORLDS)
def test_every_axis_partitions_the_ranks(world: int) -> None:
    seen = set()
    for grid in grids(world):
        assert grid.world == world
        for axis in AXES:
            if grid.extent(axis) in seen:
                continue
            seen.add(grid.extent(axis))
            groups = grid.groups(axis)
            assert sorted(itertools.chain(*groups)) == list(range(world)), (grid, axis)
            for group in groups:
                assert len(group) == grid.size(axis)
                for place, rank in enumerate(group):
                    assert grid.ranks(axis, rank) == group and grid.coordinate(axis, rank) == place


def test_coordinates_are_digits_of_the_rank() -> None:
    grid = MeshConfig(pp=2, dp=6, replicate=2, cp=3, tp=4, ep=8, expert_tensor=False).grid(144)
    for rank in range(grid.world):
        at = {axis: grid.coordinate(axis, rank) for axis in AXES}
        assert rank == ((at["pp"] * 6 + at["dp"]) * 3 + at["cp"]) * 4 + at["tp"]
        assert at["dp"] == at["replicate"] * 3 + at["shard"]
        assert at["dp_cp"] == at["dp"] * 3 + at["cp"] and at["shard_cp"] == at["shard"] * 3 + at["cp"]
        assert rank == (at["pp"] * 9 + at["edp"]) * 8 + at["ep"] == at["pp"] * 72 + at["dp_cp_tp"]


def test_expert_tensor_leaves_tp_out_of_ep() -> None:
    grid = MeshConfig(tp=2, cp=2, ep=4, expert_tensor=True).grid(16)
    assert grid.ranks("ep", 0) == [0, 2, 4, 6] and grid.ranks("ep", 9) == [9, 11, 13, 15]
    assert grid.ranks("edp", 0) == [0, 8] and grid.size("edp") == 2
    whole = MeshConfig(tp=2, cp=2, ep=4).grid(16)
    assert whole.ranks("ep", 0) == [0, 1, 2, 3] and whole.ranks("edp", 1) == [1, 5, 9, 13]


def test_a_thousand_ranks() -> None:
    grid = MeshConfig(pp=4, replicate=4, cp=2, tp=4, ep=16).grid(1024)
    assert grid.ranks("pp", 1023) == [255, 511, 767, 1023]
    assert grid.ranks("replicate", 70) == [6, 70, 134, 198] and grid.ranks("shard_cp", 70) == [*range(66, 130, 4)]
    assert all(sorted(itertools.chain(*grid.groups(axis))) == list(range(1024)) for axis in AXES)


def test_boxes_of_several_axes() -> None:
    grid = MeshConfig(pp=2, replicate=2, cp=2, tp=2, ep=4).grid(32)
    assert grid.box(("replicate", "shard_cp"), 1) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert grid.box(("pp", "dp", "tp"), 2) == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31]
    assert grid.box(("pp", "edp", "ep"), 31) == list(range(32))
    assert grid.box((), 5) == [5]
    assert grid.box(("dp", "ep"), 0) == list(range(16))  # these ep groups fill cp and tp
    for axes in (("tp", "cp"), ("ep", "tp"), ("tp", "ep"), ("cp", "ep"), ("dp", "shard")):
        with pytest.raises(ValueError, match=f"mesh axes {axes[0]} and {axes[1]} do not form a grid"):
            grid.box(axes, 0)


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ValueError, match="no mesh axis 'dp_pc'; did you mean 'dp_cp'"):
        Grid().size("dp_pc")


# ---------------------------------------------------------------------------------------------------- sizes that fit


@pytest.mark.parametrize(
    ("sizes", "world", "wrong", "right"),
    [
        (
            {"dp": 2},
            1,
            "mesh.dp=2, but the launcher started 1 rank(s)",
            "start 2 ranks, or leave mesh.dp out to use all of them (dp=1)",
        ),
        (
            {"dp": 2, "tp": 2},
            8,
            "mesh: dp=2 x tp=2 = 4, but the launcher started 8 rank(s)",
            "start 4 ranks, or leave mesh.dp out to use all of them (dp=4)",
        ),
        (
            {"dp": 3, "tp": 3},
            8,
            "mesh: dp=3 x tp=3 = 9, but the launcher started 8 rank(s)",
            "start 9 ranks, or choose sizes of product 8",
        ),
        (
            {"tp": 3},
            4,
            "mesh: tp=3 does not divide 4 rank(s)",
            "start a multiple of 3 ranks, or make mesh.tp one of 1, 2, 4",
        ),
        (
            {"pp": 2, "cp": 2, "tp": 2},
            12,
            "mesh: pp=2 x cp=2 x tp=2 = 8 does not divide 12 rank(s)",
            "start a multiple of 8 ranks, or make mesh.pp one of 1, 3, or mesh.cp one of 1, 3, or mesh.tp one of 1, 3",
        ),
        (
            {"pp": 2, "tp": 2},
            9,
            "mesh: pp=2 x tp=2 = 4 does not divide 9 rank(s)",
            "start a multiple of 4 ranks, or choose sizes whose product is one of 1, 3, 9",
        ),
        ({"replicate": 3, "tp": 2}, 8, "mesh.replicate=3 does not divide dp=4", "valid here: 1, 2, 4"),
        (
            {"ep": 3, "tp": 2},
            8,
            "mesh.ep=3 does not divide dp=4 x cp=1 x tp=2 = 8, the ranks of a pipeline stage that share out the experts",
            "valid here: 1, 2, 4, 8",
        ),
        (
            {"ep": 8, "tp": 2, "expert_tensor": True},
            8,
            "mesh.ep=8 does not divide dp=4 x cp=1 = 4, the ranks of a pipeline stage that share out the experts; "
            "each expert is cut over tp besides (mesh.expert_tensor)",
            "valid here: 1, 2, 4",
        ),
        (
            {"expert_tensor": True},
            8,
            "mesh.expert_tensor=true cuts every expert over tp, but mesh.tp=1",
            "set mesh.tp to 2 or more, or leave mesh.expert_tensor out",
        ),
    ],
)
def test_sizes_that_do_not_fit_say_what_would(sizes: dict[str, Any], world: int, wrong: str, right: str) -> None:
    text = f"{wrong}; {right}"
    with pytest.raises(ValueError) as caught:
        MeshConfig(**sizes).grid(world)
    assert str(caught.value) == text
    with pytest.raises(ValueError) as caught:  # and before any group is formed: no process has been started here
        Mesh(MeshConfig(**sizes), Processes(0, world, 0, torch.device("cpu")))
    assert str(caught.value) == text


def test_a_grid_without_a_number_of_ranks_is_the_smallest() -> None:
    assert MeshConfig().grid().world == 1
    assert MeshConfig(dp=4, pp=2).grid().world == 8
    assert MeshConfig(pp=2, cp=2, tp=2).grid().world == 8
    assert MeshConfig(tp=2, ep=8).grid() == Grid(shard=4, tp=2, ep=8)
    assert MeshConfig(tp=2, ep=8, expert_tensor=True).grid() == Grid(shard=8, tp=2, ep=8, expert_tensor=True)
    assert MeshConfig(replicate=3, tp=2, ep=4).grid() == Grid(replicate=3, shard=2, tp=2, ep=4)
    for config in layouts(16):
        free = config.model_copy(update={"dp": None})
        smallest = free.grid()
        assert all(smaller % smallest.dp for smaller in range(1, smallest.dp)) and config.grid(16).dp % smallest.dp == 0


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8])
def test_layouts_are_all_that_are_legal(world: int) -> None:
    def legal(**sizes: Any) -> bool:
        try:
            MeshConfig(**sizes).grid(world)
        except ValueError:
            return False
        return True

    sizes = range(1, world + 1)
    names = ("pp", "dp", "replicate", "cp", "tp", "ep")
    brute = {
        (*values, expert)
        for values in itertools.product(sizes, repeat=6)
        if values[0] * values[1] * values[3] * values[4] == world
        for expert in (False, True)
        if legal(**dict(zip(names, values)), expert_tensor=expert)
    }
    found = [tuple(getattr(config, name) for name in (*names, "expert_tensor")) for config in layouts(world)]
    assert len(found) == len(set(found)) and set(found) == brute


def test_layouts_within_limits_and_in_order() -> None:
    found = layouts(8, pp=2, cp=1, tp=(1, 4), replicate=1, ep=[1, 2], expert_tensor=False)
    assert [line(config.grid(8)) for config in found] == [
        "dp 8 = 8 rank(s)",
        "dp 2 x tp 4 = 8 rank(s)",
        "dp 8 = 8 rank(s); experts: edp 4 x ep 2",
        "pp 2 x tp 4 = 8 rank(s)",
        "pp 2 x dp 4 = 8 rank(s)",
        "dp 2 x tp 4 = 8 rank(s); experts: edp 4 x ep 2",
        "pp 2 x tp 4 = 8 rank(s); experts: edp 2 x ep 2",
        "pp 2 x dp 4 = 8 rank(s); experts: edp 2 x ep 2",
    ]
    assert all(config.expert_tensor for config in layouts(4, expert_tensor=True))
    assert layouts(4, dp=1, pp=1, cp=1, tp=2) == []


# ------------------------------------------------------------------------------------------------------ real groups

FOUR: list[dict[str, Any]] = [
    {},
    {"tp": 2, "ep": 2},
    {"pp": 2, "cp": 2},
    {"replicate": 2, "ep": 4},
    {"cp": 2, "tp": 2, "ep": 2, "expert_tensor": True},
    {"dp": 1, "pp": 4},
]


def test_groups_talk_to_the_right_ranks() -> None:
    results = run_ranks(mesh_ranks.describe, 4, FOUR)
    for number, sizes in enumerate(FOUR):
        grid = MeshConfig(**sizes).grid(4)
        for rank, result in enumerate(results):
            about = result[number]
            for axis in AXES:
                ranks, size = grid.ranks(axis, rank), grid.size(axis)
                assert about[axis] == (ranks, grid.coordinate(axis, rank), size, ranks if size > 1 else None), axis
            assert about["place"] == (grid.coordinate("dp", rank), grid.dp)
            assert about["dp mesh"] == (grid.ranks("dp", rank) if grid.dp > 1 else None)
    # Groups of the same ranks are one, and none is made that exists: dp only, tp + edp = dp, pp + cp, ...
    assert [about["groups"] for about in results[0]] == [0, 2, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("world", "some"),
    [
        (
            4,
            [
                {"tp": 2, "ep": 4},
                {"pp": 2, "cp": 2, "ep": 2},
                {"replicate": 2, "tp": 2, "expert_tensor": True},
                {"cp": 2, "tp": 2, "ep": 2, "expert_tensor": True},
            ],
        ),
        (8, [{"pp": 2, "cp": 2, "tp": 2, "ep": 4}, {"replicate": 2, "tp": 2, "ep": 2}]),
    ],
)
def test_groups_are_those_that_megatron_core_forms(world: int, some: list[dict[str, Any]]) -> None:
    pytest.importorskip("megatron.core.parallel_state")
    results = run_ranks(mesh_ranks.megatron, world, some, preload=("megatron.core.parallel_state",))
    for rank, result in enumerate(results):
        for sizes, groups in zip(some, result):
            for axis, (theirs, ours) in groups.items():
                assert rank in theirs and ours == theirs, (sizes, axis, rank)


def test_device_meshes_are_made_of_our_groups() -> None:
    for rank, (hybrid, flat, experts, pipeline) in enumerate(run_ranks(mesh_ranks.device_meshes, 4)):
        rows, columns = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
        row, column = rows[rank // 2], columns[rank % 2]
        assert hybrid == flat == experts == pipeline == (rows, [column, row])


def test_fsdp_replicates_and_shards_on_our_mesh() -> None:
    for gradient, alone, shard in run_ranks(mesh_ranks.hybrid_shard, 4):
        torch.testing.assert_close(gradient, alone, rtol=1e-6, atol=1e-6)
        assert shard == [2, 3]


def test_groups_wait_as_long_as_the_job_does() -> None:
    assert run_ranks(mesh_ranks.patience, 4) == [77.0] * 4


def test_a_hung_collective_of_a_part_of_the_ranks_ends() -> None:
    first, _, third, _ = run_ranks(mesh_ranks.hung, 4, timeout=60)
    for said in (first, third):
        assert "1000ms" in said, said


def test_one_process_needs_no_groups() -> None:
    mesh = Mesh(MeshConfig(), Processes(0, 1, 0, torch.device("cpu")))
    assert mesh.dp is None and (mesh.dp_rank, mesh.dp_size) == (0, 1)
    assert all(mesh.group(axis) is None and mesh.ranks(axis) == [0] for axis in AXES)
    assert mesh.picture() == mesh.draw() == "dp 1 = 1 rank(s) on cpu"
    with pytest.raises(ValueError, match=r"no device mesh over mesh axes of size 1 \(tp\): leave them out"):
        mesh.device_mesh("tp")


def test_a_communicator_bound_to_a_device_is_split_by_all_ranks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's split is collective over all ranks: one call an axis, with all of its groups."""
    calls: list[tuple[str, list[list[int]]]] = []

    def split_group(split_ranks: list[list[int]], timeout: None, group_desc: str) -> str:
        calls.append((group_desc, split_ranks))
        return group_desc

    world = SimpleNamespace(bound_device_id=torch.device("cuda", 0))
    monkeypatch.setattr(module, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=world), split_group=split_group))
    mesh = Mesh(MeshConfig(pp=2, dp=1, tp=2), Processes(3, 4, 3, torch.device("cpu")))
    assert calls == [("mesh_pp", [[0, 2], [1, 3]]), ("mesh_tp", [[0, 1], [2, 3]])]
    assert [mesh.group("tp"), mesh.group("dp_cp_tp"), mesh.group("dp")] == ["mesh_tp", "mesh_tp", None]


# ------------------------------------------------------------------------------------------------------ the picture


def test_picture_in_one_line() -> None:
    def picture(world: int, **sizes: Any) -> str:
        return line(MeshConfig(**sizes).grid(world), " on cpu")

    assert picture(2) == "dp 2 = 2 rank(s) on cpu"
    assert picture(4, dp=1, tp=4) == "tp 4 = 4 rank(s) on cpu"
    assert picture(8, replicate=2) == "dp 8 (replicate 2 x shard 4) = 8 rank(s) on cpu"
    assert (
        picture(64, pp=2, replicate=2, cp=2, tp=4, ep=8)
        == "pp 2 x dp 4 (replicate 2 x shard 2) x cp 2 x tp 4 = 64 rank(s) on cpu; experts: edp 4 x ep 8"
    )
    assert picture(8, tp=2, expert_tensor=True) == "dp 4 x tp 2 = 8 rank(s) on cpu; experts: edp 4 x ep 1 x tp 2"


def test_drawing_of_one_axis_is_its_line() -> None:
    assert draw(MeshConfig().grid(64), node=8) == "dp 64 = 64 rank(s)"
    assert draw(MeshConfig(dp=1, pp=4).grid(4)) == "pp 4 = 4 rank(s)"


def test_drawing_of_eight_ranks() -> None:
    grid = MeshConfig(pp=2, tp=2, ep=2).grid(8)
    assert draw(grid, rank=5, node=4, where=" on cuda").splitlines() == [
        "pp 2 x dp 2 x tp 2 = 8 rank(s) on cuda; experts: edp 2 x ep 2",
        "              tp 0  tp 1",
        "  pp 0  dp 0     0     1  node 0",
        "        dp 1     2     3  node 0",
        "  pp 1  dp 0     4     5  node 1",
        "        dp 1     6     7  node 1",
        "groups of rank 5:",
        "  pp   1, 5",
        "  dp   5, 7",
        "  tp   4, 5",
        "  ep   4, 5",
        "  edp  5, 7",
    ]


def test_drawing_with_context() -> None:
    assert draw(MeshConfig(cp=2, tp=2).grid(8)).splitlines() == [
        "dp 2 x cp 2 x tp 2 = 8 rank(s)",
        "           cp 0    |    cp 1",
        "        tp 0  tp 1 | tp 0  tp 1",
        "  dp 0     0     1 |    2     3",
        "  dp 1     4     5 |    6     7",
        "groups of rank 0:",
        "  dp     0, 4",
        "  cp     0, 2",
        "  tp     0, 1",
        "  dp_cp  0, 2, 4, 6",
    ]


def test_drawing_of_a_thousand_ranks_leaves_the_middle_out() -> None:
    text = draw(MeshConfig(pp=8, replicate=4, tp=8, ep=32).grid(1024), node=8)
    assert text.splitlines() == [
        "pp 8 x dp 16 (replicate 4 x shard 4) x tp 8 = 1024 rank(s); experts: edp 4 x ep 32",
        "               tp 0  tp 1  tp 2  tp 3  tp 4  tp 5  tp 6  tp 7",
        "  pp 0  dp 0      0     1     2     3     4     5     6     7  node 0",
        "        dp 1      8     9    10    11    12    13    14    15  node 1",
        "        ...",
        "        dp 15   120   121   122   123   124   125   126   127  node 15",
        "  pp 1  dp 0    128   129   130   131   132   133   134   135  node 16",
        "        dp 1    136   137   138   139   140   141   142   143  node 17",
        "        ...",
        "        dp 15   248   249   250   251   252   253   254   255  node 31",
        "  ...",
        "  pp 7  dp 0    896   897   898   899   900   901   902   903  node 112",
        "        dp 1    904   905   906   907   908   909   910   911  node 113",
        "        ...",
        "        dp 15  1016  1017  1018  1019  1020  1021  1022  1023  node 127",
        "groups of rank 0:",
        "  pp         0, 128, ..., 896 (8 ranks)",
        "  dp         0, 8, ..., 120 (16 ranks)",
        "  replicate  0, 32, 64, 96",
        "  shard      0, 8, 16, 24",
        "  tp         0-7",
        "  ep         0-31",
        "  edp        0, 32, 64, 96",
    ]


def test_drawing_of_wide_stages_names_runs_of_ranks() -> None:
    text = draw(MeshConfig(dp=2, cp=8, tp=8).grid(128), node=8)
    assert text.splitlines()[:4] == [
        "dp 2 x cp 8 x tp 8 = 128 rank(s)",
        "          cp 0  |   cp 1  | ... |   cp 7",
        "  dp 0      0-7 |    8-15 | ... |   56-63  nodes 0-7",
        "  dp 1    64-71 |   72-79 | ... | 120-127  nodes 8-15",
    ]


def test_drawings_stay_readable() -> None:
    for config in layouts(1024, replicate=(1, 4), ep=(1, 16), expert_tensor=False):
        rows = draw(config.grid(1024), rank=1000, node=8).splitlines()
        assert len(rows) <= 32 and max(map(len, rows)) <= 140, config
