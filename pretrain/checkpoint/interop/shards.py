"""safetensors files: written in shards with an index, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face folders need the safetensors package: pip install safetensors") from None
    return safetensors


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> int:
    """Writes named CPU tensors to `folder`, one model.safetensors or shards with an index. Returns bytes of tensors.

    limit: bytes of tensors in one file; a larger tensor has one to itself. Only one file's tensors are held at a time.
    """
    save_file = _library().torch.save_file
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def part(number: int) -> Path:
        return folder / f"shard-{number:05d}"

    def flush() -> None:
        nonlocal size
        if held:
            path = part(len(files))
            path.touch()
            mode = path.stat().st_mode  # the library's own choice is to let nobody else read
            save_file(held, path, metadata={"format": "pt"})
            path.chmod(mode)
            files.append(list(held))
            held.clear()
            size = 0

    for name, tensor in tensors:
        if size + tensor.nbytes > limit:
            flush()
        # A copy: the library refuses views that share memory, and a view would keep all of it.
        held[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        part(0).rename(folder / SINGLE)
        return total
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        part(number).rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


class Shards:
    """The tensors of a folder. Raises ValueError if it has no safetensors, CheckpointError if a file is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Any] = {}
        self.places = self._places()

    def _places(self) -> dict[str, str]:
        """Name of a tensor -> its file, as the files themselves say."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.is_file() and not single.is_file():
            old = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; convert {old[0]} to safetensors first" if old else ""
            raise ValueError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")
        if not index.is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        try:
            listed = json.loads(index.read_text())["weight_map"]
            files = sorted(set(listed.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {type(error).__name__} {error}") from None
        for name in files:
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name} is missing; {INDEX} lists it")
        found = {name: file for file in files for name in list(self._file(file).keys())}
        lost = sorted(set(listed) - set(found))
        if lost:
            raise CheckpointError(f"{self.folder / listed[lost[0]]} does not hold {lost[0]}, which {INDEX} lists there")
        return found

    def _file(self, name: str) -> Any:
        if name not in self._open:
            library = _library()
            try:
                self._open[name] = library.safe_open(self.folder / name, framework="pt")
            except (library.SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} is damaged: {error}") from None
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self.places[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor in the file's dtype, on the CPU. Raises CheckpointError if its bytes cannot be read."""
        place = self.places[name]
        try:
            tensor: Tensor = self._file(place).get_tensor(name)
        except (_library().SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder / place} is damaged at {name}: {error}") from None
        if not tensor.is_floating_point() or tensor.dtype.itemsize < torch.bfloat16.itemsize:
            raise ValueError(f"{self.folder / place}: {name} is {tensor.dtype}; quantised weights cannot be imported")
        return tensor
