"""What must be on disk before what: the order of fsync and rename in a save, and files replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import durable
from pretrain.checkpoint.lifecycle import Checkpoints


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_pointer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def where(path: str) -> str:
        relative = os.path.relpath(path, tmp_path)
        return "/".join("*" if part.endswith((".partial", ".temporary")) else part for part in relative.split("/"))

    def fsync(descriptor: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        log.append(("fsync", where(str(Path(f"/proc/self/fd/{number}").readlink()))))
        real_fsync(descriptor)

    def rename(old: str, new: str) -> None:
        log.append(("rename", where(os.fspath(new))))
        real_rename(old, new)

    def replace(old: str, new: str) -> None:
        log.append(("rename", where(os.fspath(new))))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    Checkpoints(tmp_path).save(1, {"model/w": torch.ones(3)}, {})
    assert log == [
        ("fsync", ".."),  # for the name of the folder
        ("fsync", "*/00000.data"),
        ("fsync", "*/00000.sums"),
        ("fsync", "*/index.json"),
        ("fsync", "*/meta.json"),
        ("fsync", "*"),  # the folder, for the names in it
        ("rename", "step_00000001"),  # from here on it counts
        ("fsync", "."),
        ("fsync", "*"),
        ("rename", "latest"),
        ("fsync", "."),
    ]


def test_a_failed_replacement_leaves_the_old_text_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    durable.write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", fail)
        durable.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_keeps_floats_bit_for_bit_and_names_a_damaged_file(tmp_path: Path) -> None:
    value = {"x": [0.1, 1e-310, float("inf")], "text": "β"}
    durable.write_json(tmp_path / "a.json", value)
    assert durable.read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        durable.read_json(tmp_path / "a.json")
