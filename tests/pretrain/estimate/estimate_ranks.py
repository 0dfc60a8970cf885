"""What the ranks of the estimates' tests run: steps of a real engine, its tensors weighed and its messages counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.engines import DeepSpeedConfig, TorchConfig
from parallel.layout import local
from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain.config import RunConfig
from pretrain.model.decoder import Decoder
from pretrain.train.build import engine_for
from pretrain.train.step import autocast
from tests.pretrain.estimate.settings import batches


class Key(NamedTuple):
    op: str
    ranks: tuple[int, ...]


class Seen(NamedTuple):
    """Bytes of state, and messages of one step: (calls, bytes) by kind and group."""

    weights: int
    gradients: int
    optimizer: int
    messages: dict[Key, tuple[int, int]]


OPS = {  # of the dispatcher: (our name, which argument holds S bytes)
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send_recv", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
}


class Wire(TorchDispatchMode):
    """Counts the messages of this rank, as they reach torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name in OPS:
                op, place = OPS[name]
                group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
                key = Key(op, tuple(dist.get_process_group_ranks(group)))
                self.calls[key] += 1
                self.bytes[key] += sum(
                    t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(args[place])
                )
        return func(*args, **(kwargs or {}))


@contextmanager
def _reductions(whole: list[int]) -> Iterator[None]:
    """Bytes of the whole gradients that FSDP2 reduces: they have been there since the first micro-batch."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    real = group.foreach_reduce

    def reduce(parameters: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        whole.append(sum(gradient.numel() * gradient.element_size() for gradient in gradients))
        return real(parameters, gradients, *args, **kwargs)

    group.foreach_reduce = reduce
    try:
        yield
    finally:
        group.foreach_reduce = real


def _bytes(tensors: Any) -> int:
    """Of the storages behind the tensors, each once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors) if t.numel()}
    return sum(held.values())


def step(rank: int, world: int, raw: dict[str, Any]) -> Seen:
    """A step after a first one, which forms what is formed once."""
    config = RunConfig.model_validate(raw)
    job = Processes(rank, world, rank, torch.device("cpu"), timedelta(seconds=60))
    mesh = Mesh(config.mesh, job)
    torch.manual_seed(0)
    engine = engine_for(config, mesh, Decoder(config.model))
    rows = batches(config, mesh.dp_size, mesh.dp_rank)
    context = (lambda: autocast(job.device, "bf16")) if config.train.precision == "bf16" else nullcontext
    engine.forward_backward(rows, 100.0, context)
    engine.step(1e-3)
    wire = Wire()
    whole: list[int] = []
    if isinstance(config.engine, DeepSpeedConfig):
        real = engine.backward

        def backward(loss: Tensor, last: bool) -> None:
            if last:
                whole.append(_bytes([p.grad for p in engine.model.parameters() if p.grad is not None]))
            real(loss, last)

        engine.backward = backward  # type: ignore[method-assign]
    with wire, _reductions(whole):
        engine.forward_backward(rows, 100.0, context)
    weighed = _gradients(engine, config, whole, len(rows))
    with wire:
        engine.step(1e-3)
    weights, optimizer = _state(engine, config)
    messages = {key: (wire.calls[key], wire.bytes[key]) for key in wire.calls}
    return Seen(weights, weighed, optimizer, messages)


class Live(TorchDispatchMode):
    """Within it, `peak` is the most bytes at a time of all storages that operators have made, as large as they are at that time:
    FSDP2 makes its buffers larger and smaller behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        there = {key: storage.nbytes() for key, each in self.storages.items() if (storage := each()) is not None}
        self.storages = {key: self.storages[key] for key in there}
        self.peak = max(self.peak, sum(there.values()))
        return result


def lived(rank: int, world: int, raws: list[dict[str, Any]]) -> list[int]:
    """For each of several runs, the most bytes at a time, besides weights and optimizer, of a second step's passes."""
    job = Processes(rank, world, rank, torch.device("cpu"), timedelta(seconds=60))
    peaks = []
    for raw in raws:
        config = RunConfig.model_validate(raw)
        mesh = Mesh(config.mesh, job)
        torch.manual_seed(0)
        engine = engine_for(config, mesh, Decoder(config.model))
        rows, live = batches(config, mesh.dp_size, mesh.dp_rank), Live()
        for _ in range(2):
            live.peak = 0
            with live:
                engine.forward_backward(rows, 100.0)
            engine.step(1e-3)
        peaks.append(live.peak)
    return peaks


def _gradients(engine: Any, config: RunConfig, whole: list[int], micro_batches: int) -> int:
    if isinstance(config.engine, DeepSpeedConfig):
        if config.engine.stage == 1:
            return whole[0]
        if config.engine.stage == 2:
            found = [t for each in engine.zero.averaged_gradients.values() for t in each]
        else:
            found = list(engine.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())
        return sum(t.numel() * t.element_size() for t in found)
    gradients: list[Tensor] = [p.grad for p in engine.model.parameters() if p.grad is not None]
    if whole and micro_batches > 1 and not config.engine.reduce_each_micro_batch:
        return sum(whole) + _bytes([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    return _bytes(gradients)


def _state(engine: Any, config: RunConfig) -> tuple[int, int]:
    if isinstance(config.engine, TorchConfig):
        moments = [t for state in engine.optimizer.state.values() for k, t in state.items() if k != "step"]
        return _bytes(engine.model.parameters()), _bytes(moments)
    zero = engine.zero
    moments = [t for state in zero.optimizer.state.values() for k, t in state.items() if k != "step"]
    experts = [] if engine.experts is None else list(engine.experts.state.values())
    moments += [t for state in experts for k, t in state.items() if k != "step"]
    if config.engine.stage == 3:
        shards = [p.ds_tensor for p in engine.names.values()]
        whole = [p.data for p in engine.names.values() if p.data.numel() > 0 and p.ds_persist]
        return _bytes([*shards, *whole, *engine._flats]), _bytes(moments)
    return _bytes([*engine.model.parameters(), *engine._flats]), _bytes(moments)
