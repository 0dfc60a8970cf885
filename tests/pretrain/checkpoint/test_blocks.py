"""Damage at rest: every flipped bit is refused, and named; what else happened to a file is told apart from it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import blocks, storage
from pretrain.checkpoint.blocks import BLOCK, CheckedReader, HashingWriter
from pretrain.checkpoint.errors import CheckpointError, NoLoadableCheckpoint
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.planned import Reader
from pretrain.checkpoint.sealed import read_sealed, write_sealed

TENSORS = {
    "model/w": torch.arange(100, dtype=torch.float32),
    "model/b": torch.full((7,), 1.5, dtype=torch.bfloat16),
    "optimizer/step": torch.tensor(3),
    "model/none": torch.zeros(0, 4),
}


def damage(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flips(count: int, seed: int, folder: Path) -> int:
    """Flips random bits of a checkpoint, one at a time; returns how many were refused. Every file is hit by size."""
    checkpoints = Checkpoints(folder, report=lambda line: None)
    path = checkpoints.save(1, TENSORS, {"step": 1})
    generator, refused = random.Random(seed), 0
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    for _ in range(count):
        file = generator.choices(files, sizes)[0]
        bit = generator.randrange(8 * file.stat().st_size)
        damage(file, bit)
        try:
            checkpoints.resume({name: torch.empty_like(tensor) for name, tensor in TENSORS.items()})
        except NoLoadableCheckpoint:
            refused += 1
        damage(file, bit)
    loaded = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    assert checkpoints.resume(loaded) is not None and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    return refused


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    assert flips(200, 0, tmp_path) == 200


@pytest.mark.campaign
def test_a_thousand_flipped_bits_are_refused(tmp_path: Path) -> None:
    assert flips(1000, 1, tmp_path) == 1000


def written(path: Path, data: bytes) -> tuple[Path, int, bytes]:
    with HashingWriter(path) as file:
        for start in range(0, len(data), 3_000_001):  # pieces that fit no block
            file.write(memoryview(data)[start : start + 3_000_001])
        file.finish()
        return path, file.position, bytes(file.sums)


def test_files_of_all_lengths_come_back(tmp_path: Path) -> None:
    source = random.Random(0).randbytes(2 * BLOCK + 5)
    for size in (0, 1, 8, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5):
        path, length, sums = written(tmp_path / str(size), source[:size])
        assert path.read_bytes() == source[:size] and len(sums) == blocks.RECORD * -(-size // BLOCK)
        with CheckedReader(path, length, sums) as file:
            assert file.check() == []
            start = size // 3
            target = bytearray(size - start)
            file.readinto(memoryview(target), start)
            assert target == source[start:size]


def test_kinds_of_damage_are_told_apart(tmp_path: Path) -> None:
    source = random.Random(1).randbytes(2 * BLOCK + 1000)
    path, size, sums = written(tmp_path / "x", source)

    def found(data: bytes) -> str:
        path.write_bytes(data)
        with CheckedReader(path, size, sums) as file:
            return "; ".join(map(str, file.check()))

    one = bytearray(source)
    one[BLOCK + 77_777] ^= 1 << 5
    assert f"block 2 of 3 (bytes {BLOCK} to {2 * BLOCK - 1}) is damaged: bit 5 of byte {BLOCK + 77_777}" in found(one)
    last = bytearray(source)
    last[-1] ^= 1
    assert f"bit 0 of byte {size - 1} is flipped, and nothing else" in found(last)
    two = bytearray(one)
    two[BLOCK + 77_000] ^= 1 << 5
    assert "many bits differ" in found(two)
    torn = source[: 2 * BLOCK - 5000] + bytes(5000) + source[2 * BLOCK :]
    assert "block 2 of 3" in found(torn) and "it ends in 5000 zero bytes" in found(torn)
    path.write_bytes(source[:-1])
    with pytest.raises(CheckpointError, match=f"has {size - 1} bytes instead of {size}"):
        CheckedReader(path, size, sums)


def test_damage_between_hashing_and_the_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that changes a bit after the hash was taken from memory."""

    def damaging(self: HashingWriter, block: memoryview, size: int) -> None:
        changed = bytearray(block[:size])
        changed[11] ^= 2
        write(self, memoryview(changed), size)

    write = HashingWriter._write
    monkeypatch.setattr(HashingWriter, "_write", damaging)
    storage.write(tmp_path, TENSORS)
    with pytest.raises(CheckpointError, match="bit 1 of byte 11 is flipped"):
        storage.read(tmp_path, {"model/b": torch.empty(7, dtype=torch.bfloat16)}, subset=True)
    assert len(Reader(tmp_path).check()) == 1


def test_files_of_different_saves_are_not_mixed(tmp_path: Path) -> None:
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, report=lines.append)
    paths = [checkpoints.save(step, {"model/w": torch.full((5,), float(step))}, {}) for step in (1, 2)]
    for name in ("00000.data", "00000.sums", "index.json", "meta.json"):
        good = (paths[1] / name).read_bytes()
        (paths[1] / name).write_bytes((paths[0] / name).read_bytes())
        w = torch.zeros(5)
        resumed = checkpoints.resume({"model/w": w})
        if name == "meta.json":
            assert resumed is None or resumed.step == 1
        assert w.tolist() == [1.0] * 5, name
        (paths[1] / name).write_bytes(good)


def test_a_sealed_file_refuses_any_change(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, {"x": [0.1, float("inf")], "text": "β"})
    assert {**read_sealed(path), "sha256": ""} == {"x": [0.1, float("inf")], "text": "β", "sha256": ""}
    for byte in range(path.stat().st_size):
        damage(path, 8 * byte + byte % 8)
        with pytest.raises(ValueError, match=r"a\.json is damaged"):
            read_sealed(path)
        damage(path, 8 * byte + byte % 8)
    read_sealed(path)
