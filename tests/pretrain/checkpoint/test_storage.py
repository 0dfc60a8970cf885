"""Named tensors to a folder and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import storage
from pretrain.checkpoint.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {f"model/{dtype}".replace("torch.", ""): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES}
    tensors |= {
        "model/scalar": torch.tensor(3.5),
        "model/none": torch.empty(0, 4),
        "model/nan": torch.tensor([torch.nan]),
    }
    tensors["model/part"] = torch.arange(100.0)[10:20:3]  # a strided view: only its own numbers are written
    files = storage.write(tmp_path, tensors)
    assert files == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert storage.contents(tmp_path) == {n: storage.Spec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    empty = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    storage.read(tmp_path, empty)
    for name, tensor in tensors.items():
        assert torch.equal(empty[name].nan_to_num(-1), tensor.nan_to_num(-1)), name
    assert str(storage.contents(tmp_path)["model/bfloat16"]) == "bfloat16 [2, 3]"


def test_what_does_not_fit_is_listed_and_nothing_is_read(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/a": torch.ones(2), "model/b": torch.ones(3), "model/c": torch.ones(1)})
    a, b = torch.zeros(2), torch.zeros(4)
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        storage.read(tmp_path, {"model/a": a, "model/b": b, "model/d": torch.zeros(1)})
    text = str(caught.value)
    assert "differs: model/b is float32 [3] in the checkpoint and float32 [4] here" in text
    assert "missing from the checkpoint: model/d (float32 [1])" in text
    assert "in the checkpoint but not asked for: model/c" in text
    assert "model/a" not in text and a.tolist() == [0, 0]


def test_a_section_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/a": torch.ones(2), "optimizer/a/step": torch.tensor(1.0)})
    a = torch.zeros(2)
    storage.read(tmp_path, {"model/a": a})
    assert a.tolist() == [1, 1]


def test_subset_and_other_dtype_only_on_request(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/a": torch.tensor([1.5]), "model/b": torch.ones(3)})
    half = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model/a is float32 \[1\] in the checkpoint and bfloat16 \[1\] here"):
        storage.read(tmp_path, {"model/a": half}, subset=True)
    storage.read(tmp_path, {"model/a": half}, subset=True, cast_dtype=True)
    assert half.tolist() == [1.5]


def test_parameters_that_require_grad_are_filled_in_place(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/w": torch.ones(2)})
    parameter = torch.nn.Parameter(torch.zeros(2))
    storage.read(tmp_path, {"model/w": parameter})
    assert parameter.tolist() == [1, 1] and parameter.requires_grad


def test_a_folder_that_holds_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="File exists"):
        storage.write(tmp_path, {"model/w": torch.zeros(2)})
    w = torch.zeros(2)
    storage.read(tmp_path, {"model/w": w})
    assert w.tolist() == [1, 1]


def test_damage_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    storage.write(tmp_path, {"model/w": torch.ones(200)})
    data = tmp_path / "00000.data"
    data.write_bytes(data.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        storage.read(tmp_path, {"model/w": torch.zeros(200)})
    with pytest.raises(CheckpointError, match="cannot read the index"):
        storage.contents(tmp_path / "absent")
