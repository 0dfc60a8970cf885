"""What the ranks of the near memory tests run: a state of sharded, whole and own tensors, whose values tell the step."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines.fragment import Fragment
from parallel.layout import Cut
from parallel.share import Share
from pretrain.checkpoint import points
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.folder import Entry
from pretrain.checkpoint.near import room
from pretrain.checkpoint.near.config import NearConfig
from pretrain.checkpoint.near.tier import Tier
from pretrain.checkpoint.snapshot import Snapshots
from pretrain.model.split import Section, Split

LARGE = 1_300_000  # floats: more than one block of a file


def state(rank: int, world: int, step: int, dim: int = 0) -> dict[str, Tensor]:
    """What rank holds at a step: rows of a DTensor, parts as ZeRO and as tensor parallelism cut them, whole tensors, a view."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rows = torch.arange(35.0).reshape(7, 5) + 100 * step
    tensors: dict[str, Tensor] = {"model/both": torch.full((3,), step, dtype=torch.bfloat16)}
    tensors["optimizer/count"] = torch.tensor(float(step))
    tensors["optimizer/large"] = torch.full((LARGE,), float(step) + rank)
    tensors["optimizer/view"] = torch.full((4, 6), float(step)).t()
    if world > 1:
        tensors["model/rows"] = distribute_tensor(rows, init_device_mesh("cpu", (world,)), [Shard(dim)])
        run = rows.flatten()[rank * 7 : rank * 7 + 7].clone()
        tensors["optimizer/run"] = Fragment.at(rank * 7, run, rows.shape, "run")
        split = Split(0, (Section.even(2 * world, "heads"), Section.even(world, "heads")))  # two blocks on each rank
        cut = split.take(torch.arange(3.0 * world)[:, None] + step, rank, world)
        tensors["model/cut"] = Share.of(cut, (Cut(split, rank, world),), "cut")
    return tensors


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain copies of what this rank holds."""
    plain = {}
    for name, tensor in tensors.items():
        held = tensor.held if isinstance(tensor, Share) else getattr(tensor, "to_local", lambda t=tensor: t)()
        plain[name] = held.clone()
    return plain


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    a, b = local(a), local(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def own(rank: int, step: int) -> dict[str, Tensor]:
    return {"rng": torch.tensor([rank, step])}


def open_tier(
    rank: int, base: Path, place: Sequence[int], layout: str = "as ever", keep: int = 1
) -> tuple[Tier, list[str]]:
    """place: the number of each rank's host. The second result gets the lines reported on this rank."""
    folder = base / f"host{place[rank]}"
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    config = NearConfig(folder=folder, keep=keep)
    return Tier(config, base / "run" / "checkpoints", layout, agreement=Agreement(), report=lines.append), lines


def save_one(tier: Tier, rank: int, world: int, step: int, dim: int = 0, ready: bool = True) -> bool:
    extra = {f"rank/{name}": tensor for name, tensor in own(rank, step).items()}
    copy = Snapshots().take({**state(rank, world, step, dim), **extra})
    return tier.save(step, copy if ready else None, {"step": step})


def save(rank: int, world: int, base: Path, place: Sequence[int], steps: Sequence[int], **options: Any) -> list[str]:
    tier, lines = open_tier(rank, base, place, **options)
    assert all(save_one(tier, rank, world, step) for step in steps)
    return lines


class Back(NamedTuple):
    """What `resume` found. good: the tensors are those of the step, bit for bit; of step -1, untouched."""

    step: int | None
    good: bool
    lines: list[str]
    saves: list[str]  # steps that the rank's host has afterwards


def resume(
    rank: int,
    world: int,
    base: Path,
    place: Sequence[int],
    disk: Sequence[Entry] = (),
    layout: str = "as ever",
    dim: int = 0,
    refuse: int | None = None,
) -> Back:
    tier, lines = open_tier(rank, base, place, layout)
    tensors, streams = state(rank, world, -1, dim), own(rank, -1)

    def check(meta: dict[str, Any]) -> None:
        if meta["step"] == refuse:
            raise ValueError("another model")

    found = tier.resume(tensors, streams, disk, check)
    step = -1 if found is None else found.step
    good = same(tensors, state(rank, world, step, dim)) and torch.equal(streams["rng"], own(rank, step)["rng"])
    if found is not None:
        good = good and found.meta == {"step": step} and found.per_rank is not None and found.per_rank.keys() == {"rng"}
    dist.barrier()
    saves = [path.name.split(".")[0].removeprefix("step_").lstrip("0") for path in sorted(tier.store.root.iterdir())]
    return Back(None if found is None else step, good, lines, saves)


def resume_each(
    rank: int, world: int, base: Path, place: Sequence[int], options: Sequence[dict[str, Any]]
) -> list[Back]:
    return [resume(rank, world, base, place, **each) for each in options]


def die(rank: int, world: int, base: Path, place: Sequence[int], victim: int, at: str) -> str:
    """Save steps 10 and 20; kill -9 one rank at a point of the second."""
    tier, _ = open_tier(rank, base, place)
    assert save_one(tier, rank, world, 10)
    dist.barrier()

    def kill(point: str) -> None:
        if point == at:
            os.kill(os.getpid(), signal.SIGKILL)

    points.observer = kill if rank == victim else None
    try:
        save_one(tier, rank, world, 20)
    except RuntimeError:
        return "noticed"
    return "saved"


def fail(rank: int, world: int, base: Path, place: Sequence[int], victim: int, how: str) -> tuple[Any, ...]:
    """Save step 10, fail to save step 20 (or not), then save step 30. Returns results, lines, and the steps that are left."""
    tier, lines = open_tier(rank, base, place)
    made = [save_one(tier, rank, world, 10)]
    undo: Callable[[], Any] = lambda: None  # noqa: E731
    if rank == victim:
        undo = _break(tier, how)
    made.append(save_one(tier, rank, world, 20, ready=not (how == "busy" and rank == victim)))
    undo()
    points.observer = None
    dist.barrier()
    middle = sorted(path.name.split(".")[0] for path in tier.store.root.iterdir())
    made.append(save_one(tier, rank, world, 30))
    dist.barrier()
    return made, lines, middle, sorted(path.name.split(".")[0] for path in tier.store.root.iterdir()), tier.off


def _break(tier: Tier, how: str) -> Callable[[], Any]:
    """Breaks something on this rank; returns what mends it."""
    if how == "no room":
        free = room.free_bytes
        room.free_bytes = lambda folder: 1000
        return lambda: setattr(room, "free_bytes", free)
    if how == "full":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if how == "flipped":
        from pretrain.checkpoint.near import exchange

        arrived = exchange._Coming.arrived

        def flip(self: Any, number: int, message: Tensor) -> None:
            if number == 2:
                message[1000] ^= 4
            arrived(self, number, message)

        exchange._Coming.arrived = flip  # type: ignore[method-assign]
        return lambda: setattr(exchange._Coming, "arrived", arrived)

    def raise_at(point: str) -> None:
        if point == how:
            raise OSError(5, "Input/output error")

    points.observer = raise_at
    return lambda: None


def forget(rank: int, world: int, base: Path, place: Sequence[int], copy: Path) -> list[str]:
    """Save steps 10, forget; what a host had comes back; save step 5. Returns the names that forgetting left."""
    tier, _ = open_tier(rank, base, place)
    save_one(tier, rank, world, 10)
    dist.barrier()
    if rank == 0:
        shutil.copytree(base / "host0", copy)
    dist.barrier()
    tier.forget()
    left = [path.name for path in tier.store.root.iterdir()]
    dist.barrier()
    if rank == 0:
        shutil.copytree(copy, base / "host0", dirs_exist_ok=True)
    dist.barrier()
    return left


def clear(rank: int, world: int, base: Path, place: Sequence[int]) -> None:
    tier, _ = open_tier(rank, base, place)
    save_one(tier, rank, world, 10)
    tier.clear()
