"""Traces of a model's layers, kept in a file from one command to the next.

A trace (trace.py) takes tens of milliseconds and, the first one, the import of half of torch: most of the time of a plan. It
depends on the model, on this code and on torch, and on nothing else, so a file's name is a hash of these: what has changed is
traced again. A file that cannot be read or written is none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kernels.dispatch import VARIABLE
from pretrain.estimate.stand_in import Message, Product
from pretrain.estimate.trace import Measured, Traced, Way
from pretrain.model.decoder import DecoderConfig

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("kernels", "parallel", "pretrain")
DAYS = 30  # after which a file that nobody has changed goes


class Book:
    """The traces in one file. Only those of GPUs: a CPU's depend on its threads and caches, too."""

    def __init__(self, path: Path):
        self.path = path
        self.traces = _read(path)
        self.changed = False

    @classmethod
    def of(cls, model: DecoderConfig, folder: Path | None = None) -> Book:
        """folder: where files are; the user's cache (XDG_CACHE_HOME, ~/.cache) by default."""
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid" / "traces"
        return cls(folder / f"{_digest(model)}.json")

    def find(self, key: str) -> Traced | None:
        return self.traces.get(key)

    def add(self, key: str, trace: Traced) -> None:
        self.traces[key] = trace
        self.changed = True

    def close(self) -> None:
        """Writes what is new, and removes files of models and code that nobody has planned with for long."""
        if not self.changed:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({key: dataclasses.asdict(trace) for key, trace in self.traces.items()})
            # Under its name only when it is whole: another command may read or write it meanwhile.
            handle, made = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(made).replace(self.path)
            self.changed = False
            for other in self.path.parent.iterdir():
                if other.stat().st_mtime < time.time() - 86400.0 * DAYS:
                    other.unlink()


def key(layer: int, width: int, length: int, way: Way) -> str:
    """Of one trace. layer: its number in the model, or -1 for the multi-token layer."""
    return json.dumps([layer, width, length, dataclasses.astuple(way)])


def _digest(model: DecoderConfig) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in ("torch", "triton"):
        with suppress(PackageNotFoundError):
            found.update(f"{name} {version(name)}\n".encode())
    settings = [os.environ.get(name) for name in (VARIABLE, "TRITON_INTERPRET")]
    found.update(f"{sys.version} {platform.machine()} {settings}\n".encode())
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*")):
            if path.suffix in (".py", ".json"):
                found.update(f"{path.relative_to(ROOT)}\n".encode())
                found.update(path.read_bytes())
    found.update(model.model_dump_json().encode())
    return found.hexdigest()


def _read(path: Path) -> dict[str, Traced]:
    try:
        return {key: _trace(raw) for key, raw in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _trace(raw: dict[str, Any]) -> Traced:
    one, two = raw["both"]
    (a, b), (x, y) = raw["sent"], raw["multiplied"]
    return Traced(
        (raw["tokens"][0], raw["tokens"][1]),
        (Measured(**one), Measured(**two)),
        (tuple(Message(**each) for each in a), tuple(Message(**each) for each in b)),
        (tuple(Product(**each) for each in x), tuple(Product(**each) for each in y)),
    )
