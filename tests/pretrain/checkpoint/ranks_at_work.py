"""What the ranks of the checkpoint tests run: a tiny model with AdamW state, FSDP2 when there are several ranks."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.state import load_model_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors
from pretrain.checkpoint import points
from pretrain.checkpoint.background import BackgroundSaver
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.lifecycle import Checkpoints


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)  # 7 does not divide by 2 ranks: the shards are uneven
        self.second = nn.Linear(7, 3, bias=False)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def build(shard: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Tiny()
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.get_buffer("count").add_(1)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**model_tensors(model), **optimizer_tensors(model, optimizer)}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain copies of the full tensors, which can travel to the test's process."""
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in tensors.items()}


def save(rank: int, world: int, folder: str, steps: int, keep: int | None = 3) -> tuple[dict[str, Tensor], str]:
    model, optimizer = build(shard=world > 1)
    train(model, optimizer, 0, steps)
    tensors = state(model, optimizer)
    path = Checkpoints(folder, keep=keep).save(
        steps, tensors, {"step": steps, "lr": 0.1}, {"rng": torch.tensor([rank])}
    )
    return whole(tensors), path.name


def resume(rank: int, world: int, folder: str, more: int = 0) -> Any:
    """(step, meta, per-rank state, tensors as loaded, tensors after `more` steps, lines reported on this rank)."""
    model, optimizer = build(shard=world > 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)  # so that nothing equals the checkpoint by chance
    tensors = state(model, optimizer)
    lines: list[str] = []
    found = Checkpoints(folder, report=lines.append).resume(tensors)
    if found is None:
        return None
    load_model_tensors(model, tensors)
    load_optimizer_tensors(model, optimizer, tensors)
    loaded = whole(state(model, optimizer))
    train(model, optimizer, found.step, more)
    return found.step, found.meta, found.per_rank, loaded, whole(state(model, optimizer)), lines


def die_while_saving(rank: int, world: int, folder: str, victim: int, at: str) -> str:
    """Save step 10, then begin to save step 20 and kill -9 one rank at a point of it."""
    model, optimizer = build(shard=world > 1)
    tensors = state(model, optimizer)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(10, tensors, {"step": 10})

    def kill(point: str) -> None:
        if point == at:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        points.observer = kill
    try:
        checkpoints.save(20, tensors, {"step": 20})
    except RuntimeError as error:
        assert not isinstance(error, CheckpointError)  # a peer's death is not a failed save: this job is over
        return "the peer's death was noticed"
    return "saved"


def fail_while_saving(rank: int, world: int, folder: str, victim: int, how: str) -> tuple[str, list[str], str]:
    """Save step 10, fail to save step 20, then save step 30. Returns the error, the names in the folder, the newest."""
    model, optimizer = build(shard=world > 1)
    tensors = {**state(model, optimizer), f"big/{rank}": torch.full((50_000,), float(rank))}
    checkpoints = Checkpoints(folder)
    checkpoints.save(10, tensors, {"step": 10})

    def fail(point: str) -> None:
        if point == how:
            raise OSError(5, "Input/output error")

    if rank == victim and how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    elif rank == victim:
        points.observer = fail
    try:
        checkpoints.save(20, tensors, {"step": 20})
        error = ""
    except CheckpointError as caught:
        error = str(caught)
    dist.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    newest = checkpoints.newest()
    points.observer = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(30, tensors, {"step": 30})
    return error, names, newest.name if newest else ""


def disagree(rank: int, world: int, folder: str) -> str:
    """Only rank 0 has the folder in view (as with a stale network filesystem): all must still take the same one."""
    seen = folder if rank == 0 else f"{folder}/not-here"
    newest = Checkpoints(seen).newest()
    return newest.name if newest else ""


def misfit(rank: int, world: int, folder: str) -> str:
    """Only the last rank asks for something that is not there; all ranks must refuse."""
    model, optimizer = build(shard=world > 1)
    tensors = state(model, optimizer)
    tensors.pop("model/count")
    if rank == world - 1:
        tensors["model/extra"] = torch.zeros(2)
    checkpoints = Checkpoints(folder)
    newest = checkpoints.newest()
    assert newest is not None
    try:
        checkpoints.load(newest, tensors)
    except ValueError as error:
        return str(error)
    return ""


def hold_lease(rank: int, world: int, folder: str, ready: str) -> None:
    """Hold the lease on a run folder until killed, with a forked worker that outlives its parent."""
    from pretrain.checkpoint.lease import Lease

    with Lease(folder).acquire():
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        Path(ready).write_text(f"{os.getpid()} {worker} .")
        time.sleep(30)


def lease_all(rank: int, world: int, folder: str) -> str:
    from pretrain.checkpoint.lease import Lease, LeaseHeld

    try:
        Lease(folder).acquire()
    except LeaseHeld as error:
        return str(error)
    return "mine"


def background_saves(rank: int, world: int, folder: Path) -> tuple[list[list[float]], list[float], str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.arange(5.0)[:, None], mesh, [Shard(0)])  # the last rank's shard is shorter
    both = torch.full((2,), 7.0)
    saver = BackgroundSaver(Checkpoints(folder), lambda *_: None)
    saver.start(1, {"model/sharded": sharded, "model/both": both}, {}, {"own": torch.tensor([rank])})
    totals = []
    for _ in range(20):  # the training's own collectives, on the default group
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        totals.append(total.item())
    assert isinstance(sharded, DTensor)
    sharded.to_local().zero_()
    saver.wait()
    loaded = {"model/sharded": torch.zeros(5, 1), "model/both": torch.zeros(2)}
    resumed = saver.checkpoints.resume(loaded)
    assert resumed is not None and resumed.per_rank is not None and resumed.per_rank["own"].tolist() == [rank]
    assert loaded["model/both"].tolist() == [7, 7]

    def fail(point: str) -> None:
        if point == "writing" and rank == 1:
            raise OSError(5, "Input/output error")

    points.observer = fail
    saver.start(2, {"model/sharded": sharded, "model/both": both}, {}, {})
    try:
        saver.wait()
    except CheckpointError as error:
        return loaded["model/sharded"].tolist(), totals, str(error)
    return loaded["model/sharded"].tolist(), totals, "no failure"
