"""What near saves cost: `python -m tests.pretrain.checkpoint.near_cost [--ranks 2] [--megabytes 256]`.

Each rank, on a "host" of its own under --near, holds so much fp32 state in 64 tensors of its own. Printed: how long the state's
copy holds training, how long the save then takes beside it, the bytes that are kept, and how long it takes to come back from
there and from a checkpoint under --disk. Medians over --repeat saves. Both folders are read from the page cache here.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.lifecycle import Checkpoints
from pretrain.checkpoint.near.config import NearConfig
from pretrain.checkpoint.near.tier import Tier
from pretrain.checkpoint.snapshot import Snapshots
from tests.ranks import run_ranks

TENSORS = 64


def measure(rank: int, world: int, near: Path, disk: Path, megabytes: int, repeat: int) -> dict[str, Any]:
    folder = near / f"host{rank}"
    folder.mkdir(parents=True)
    checkpoints = Checkpoints(disk / "checkpoints")
    tier = Tier(NearConfig(folder=folder), checkpoints.folder, "a measurement", agreement=Agreement())
    each = megabytes * (1 << 20) // 4 // TENSORS
    state = {f"model/{rank}/{number}": torch.randn(each) for number in range(TENSORS)}
    rng = {"rng": torch.get_rng_state()}
    snapshots = Snapshots()
    held, beside, saved = [], [], []
    for step in range(1, repeat + 2):
        start = time.perf_counter()
        copy = snapshots.take({**state, "rank/rng": rng["rng"]})
        middle = time.perf_counter()
        assert tier.save(step, copy, {})
        held.append(middle - start)
        beside.append(time.perf_counter() - middle)
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for step in range(1, repeat + 2):
        start = time.perf_counter()
        checkpoints.save(step, state, {}, rng)
        saved.append(time.perf_counter() - start)
    start = time.perf_counter()
    assert tier.resume(state, rng, [], lambda meta: None) is not None
    from_near = time.perf_counter() - start
    start = time.perf_counter()
    assert checkpoints.resume(state) is not None
    from_disk = time.perf_counter() - start
    # The first of each allocates.
    figures = {"held": held[1:], "beside": beside[1:], "disk save": saved[1:]}
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {**medians, "kept": kept, "from near": from_near, "from disk": from_disk}


def lost(rank: int, world: int, near: Path, disk: Path, megabytes: int) -> float:
    """Seconds to come back when the first host's folder is empty."""
    folder = near / f"host{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    tier = Tier(NearConfig(folder=folder), disk / "checkpoints", "a measurement", agreement=Agreement())
    each = megabytes * (1 << 20) // 4 // TENSORS
    state = {f"model/{rank}/{number}": torch.randn(each) for number in range(TENSORS)}
    start = time.perf_counter()
    assert tier.resume(state, {"rng": torch.get_rng_state()}, [], lambda meta: None) is not None
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=256, help="of state on each rank")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--near", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    folders = [Path(tempfile.mkdtemp(prefix="near-cost-", dir=place)) for place in (arguments.near, arguments.disk)]
    try:
        shapes = (*folders, arguments.megabytes)
        figures = run_ranks(measure, arguments.ranks, *shapes, arguments.repeat, timeout=600)
        for path in (folders[0] / "host0").iterdir():
            shutil.rmtree(path)
        figures[0]["from near, a host lost"] = max(run_ranks(lost, arguments.ranks, *shapes, timeout=600))
    finally:
        for folder in folders:
            shutil.rmtree(folder)
    print(f"{arguments.ranks} ranks, {arguments.megabytes} MiB of state each")
    for name, value in figures[0].items():
        print(f"{name:24} {value / (1 << 20):8.0f} MiB on a host" if name == "kept" else f"{name:24} {value:8.3f} s")


if __name__ == "__main__":
    main()
