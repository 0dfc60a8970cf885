"""A checkpoint written on one layout of ranks is read on any other, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.layout import cuts, record
from parallel.share import Share
from parallel.state import model_tensors, optimizer_tensors
from pretrain.checkpoint import commands, storage
from pretrain.checkpoint.planned import ALIGNMENT, INDEX
from pretrain.checkpoint.sealed import read_sealed
from pretrain.model.split import Section, Split
from tests.parallel.reshape_ranks import CHANGES, LAYOUTS, copies, load, save
from tests.parallel.tensor_ranks import assemble, mesh_of
from tests.pretrain.families import build
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Each layout's checkpoint, and what it should hold."""
    found = {}
    for name, (world, sizes) in LAYOUTS.items():
        folder = str(tmp_path_factory.mktemp("run") / "checkpoints")
        found[name] = (folder, assemble(run_ranks(save, world, sizes, folder)))
    return found


# All layouts write; these read in a campaign only, for each of their cuts is among those of another one.
LONG = ("tp 2", "dp 2", "pp 2 x tp 2")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.campaign if name in LONG else []) for name in LAYOUTS]
)
def test_any_layout_reads_what_any_layout_wrote(layout: str, written: dict[str, Any]) -> None:
    world, sizes = LAYOUTS[layout]
    ranks = run_ranks(load, world, sizes, {name: folder for name, (folder, _) in written.items()})
    for name, (_, expected) in written.items():
        found = assemble([rank[name] for rank in ranks])
        assert found.keys() == expected.keys()
        different = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
        assert not different, f"{name} -> {layout}: {different}"


def test_all_layouts_write_the_same(written: dict[str, Any]) -> None:
    _, one = written["one"]
    assert one["optimizer/blocks.0.mixer.qkv.weight/exp_avg"].shape == (32 + 2 * 8, 32)
    assert one["model/blocks.0.ffn.gate_up"].shape == (4, 32, 24)
    for name, (folder, tensors) in written.items():
        assert tensors.keys() == one.keys(), name
        assert all(torch.equal(tensors[key], tensor) for key, tensor in one.items()), name
        # As one process without ranks sees it, export for example; and nothing is written twice.
        path = Path(folder) / "step_00000002"
        stored = storage.contents(path)
        plain = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in stored.items()}
        storage.read(path, plain)
        assert all(torch.equal(plain[key], tensor) for key, tensor in one.items()), name
        index = read_sealed(path / INDEX)["tensors"].values()
        alignment = ALIGNMENT * sum(len(entry["parts"]) for entry in index)
        size = sum(file.stat().st_size for file in path.glob("*.data"))
        assert size <= sum(spec.bytes for spec in stored.values()) + alignment, name


def test_commands_work_on_every_layout(written: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for folder, _ in written.values():
        assert commands.verify(Path(folder)) == 0
        assert commands.list_(Path(folder)) == 0
        assert commands.inspect(Path(folder), tensors=True) == 0
    assert "good" in capsys.readouterr().out


def test_whole_tensors_and_other_shares_fill_a_share() -> None:
    found = assemble(run_ranks(copies, 2))
    for name, tensor in model_tensors(build("mixer attention", 0, **CHANGES)).items():
        assert torch.equal(found[name], tensor), name


def cut_linear() -> nn.Linear:
    """The first half of the rows of an [8, 3] matrix."""
    linear = nn.Linear(3, 4, bias=False)
    record(linear, {"weight": (Split(0, (Section.even(8, "hidden"),)),)}, mesh_like(2))
    return linear


def mesh_like(tp: int) -> Any:
    class OneOfSeveral:
        def rank(self, axis: str) -> int:
            return 0

        def size(self, axis: str) -> int:
            return tp

    return OneOfSeveral()


def test_a_share_is_a_name_a_shape_and_no_numbers() -> None:
    linear = cut_linear()
    (share,) = model_tensors(linear).values()
    assert isinstance(share, Share) and share.shape == (8, 3) and share.dtype == torch.float32
    assert share.held.data_ptr() == linear.weight.data_ptr()
    with pytest.raises(NotImplementedError, match="this rank holds only a part of weight"):
        share + 1
    assert "1 blocks of [8, 3]" in repr(share)


def test_names_are_those_without_wrappers() -> None:
    linear = cut_linear()
    compiled: Any = torch.compile(nn.Sequential(linear))
    assert list(cuts(compiled)) == ["0.weight"]


def test_state_of_another_shape_is_refused() -> None:
    linear = cut_linear()
    with pytest.raises(ValueError, match=r"weight/row_var has shape \(4, 1\) for a parameter of \(4, 3\)"):
        optimizer_tensors(linear, torch.optim.Adafactor(linear.parameters(), lr=0.1))


def test_a_mesh_of_one_cuts_nothing() -> None:
    linear = nn.Linear(3, 4)
    record(linear, {"weight": (Split(0, (Section.even(4, "hidden"),)),)}, mesh_of(0, 1))
    assert not cuts(linear)
