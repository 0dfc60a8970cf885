"""Which ranks form the groups that a run measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.bench.groups import Shape, choose, read_mesh
from parallel.grid import AXES, MeshConfig


def names(shapes: list[Shape]) -> list[tuple[str, int, int]]:
    return [(shape.name, shape.size, shape.stride) for shape in shapes]


def test_words_and_sizes() -> None:
    shapes = choose(["world", "node", "rail", "2", "n=2:4"], 8, 4, None)
    assert names(shapes) == [("world", 8, 1), ("node", 4, 1), ("rail", 2, 4), ("n=2", 2, 1)]
    assert shapes[2].also == ("n=2:4",)
    assert shapes[1].groups(8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shapes[2].groups(8) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert Shape("", 2, 2).groups(8) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_default_is_the_world_or_every_axis() -> None:
    assert names(choose([], 4, 4, None)) == [("world", 4, 1)]
    grid = MeshConfig(pp=2, tp=2).grid(8)
    assert names(choose([], 8, 8, grid)) == [("pp", 2, 4), ("dp", 2, 2), ("tp", 2, 1), ("edp", 4, 1)]
    assert choose([], 8, 8, grid)[3].also == ("dp_cp_tp",)
    assert names(choose([], 1, 1, MeshConfig().grid(1))) == [("world", 1, 1)]


@pytest.mark.parametrize(
    ("mesh", "world"),
    [
        ({"pp": 2, "tp": 2, "ep": 2}, 16),
        ({"cp": 2, "tp": 4, "ep": 8, "replicate": 2}, 32),
        ({"tp": 2, "ep": 2, "expert_tensor": True}, 8),
    ],
)
def test_axes_have_the_groups_of_the_training_mesh(mesh: dict[str, int], world: int) -> None:
    grid = MeshConfig(**mesh).grid(world)
    for axis in AXES:
        (shape,) = choose([axis], world, world, grid)
        assert shape.groups(world) == grid.groups(axis), axis


def test_same_ranks_are_measured_once() -> None:
    shapes = choose(["world", "node", "4"], 4, 4, None)
    assert names(shapes) == [("world", 4, 1)]
    assert shapes[0].also == ("node", "n=4")
    assert names(choose(["1", "1:2"], 4, 4, None)) == [("n=1", 1, 1)]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("3", "groups of 3 ranks do not divide 4 ranks; .* sizes that fit: 1, 2, 4"),
        ("2:4", "every 4th do not divide 4 ranks; the number of ranks must be a multiple of 8"),
        ("0", "groups of 0 ranks"),
        ("nod", "did you mean 'node'\\?"),
        ("rail", "all 4 ranks are on one node; --node-size .* one of 1, 2, 4"),
        ("tp", "say which mesh with --config FILE or --mesh tp=SIZE"),
    ],
)
def test_groups_that_cannot_be(word: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        choose([word], 4, 4, None)


def test_nodes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="nodes of 3 ranks do not divide 4 ranks"):
        choose(["node"], 4, 3, None)


def test_mesh_of_a_run_file_and_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: x\nmesh: {tp: 2, pp: 2}\nmodel: {width: 3}\n")
    assert read_mesh(file, []) == MeshConfig(tp=2, pp=2)
    assert read_mesh(file, ["tp=4", "mesh.cp=2"]) == MeshConfig(tp=4, pp=2, cp=2)
    assert read_mesh(None, ["ep=2"]) == MeshConfig(ep=2)
    file.write_text("run: x\n")
    assert read_mesh(file, []) == MeshConfig()
    assert read_mesh(Path("configs/runs/quickstart.yaml"), []) == MeshConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mesh: {tpp: 2}", "mesh.tpp: unknown key; did you mean 'tp'"),
        ("mesh: {tp: 0}", "mesh.tp: "),
        ("mesh: [2]", "expected sections"),
        ("- 1", "expected sections"),
        ("a: {", "not valid YAML"),
    ],
)
def test_mesh_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_mesh(file, [])


def test_no_mesh_file_and_no_size() -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_mesh(Path("nowhere.yaml"), [])
    with pytest.raises(ValueError, match="'tp': write axes with their sizes, such as tp=2"):
        read_mesh(None, ["tp"])
