"""What each rank does in test_pipeline.py, and the same on one rank."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh, MeshConfig
from parallel.pipeline import PipelineRunner, Plan
from parallel.processes import Processes
from pretrain.data.batch import IGNORE, Batch
from pretrain.model.decoder import Decoder
from pretrain.model.stage import Stage
from tests.pretrain.families import build

LENGTH, STEPS = 24, 2


@dataclass(frozen=True)
class Case:
    """A model and how it is run. counts: layers of each stage, one number a stage."""

    family: str
    layers: list[str]
    schedule: str
    counts: tuple[int, ...]
    micro_batches: int
    tied: bool = True
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    dp: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Decoder:
        model = build(self.family, layers=self.layers, tie_embeddings=self.tied, **self.changes).to(self.dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # away from the ones and zeros at which some gradients vanish
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=self.dtype)
        return model

    def plan(self, pp: int) -> Plan:
        costs = [1.0] * sum(self.counts)
        return Plan.of(self.schedule, pp, costs, virtual=len(self.counts) // pp, counts=self.counts)  # type: ignore[arg-type]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    def batches(self, step: int, dp_rank: int = 0) -> list[Batch]:
        return [packed(100 * step + index + 1000 * dp_rank) for index in range(self.micro_batches)]


def packed(seed: int) -> Batch:
    """A row with borders of its own, and some targets that do not count."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm(LENGTH - 1, generator=generator)[:3] + 1).sort().values
    tokens = torch.randint(0, 256, (1, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, cuts - 1] = IGNORE
    targets[:, torch.randint(0, LENGTH, (seed % 4,), generator=generator)] = IGNORE
    return Batch(tokens[:, :-1], targets, torch.tensor([0, *cuts, LENGTH], dtype=torch.int32))


@dataclass
class Outcome:
    """loss: of each step. states: after each step, the whole tensors by name: gradients, parameters, loads."""

    loss: list[float]
    states: list[dict[str, Tensor]]
    evaluated: float = 0.0
    norms: list[float] = field(default_factory=list)
    gathered: dict[str, Any] = field(default_factory=dict)


def alone(case: Case) -> Outcome:
    """All micro-batches of all data-parallel ranks on one rank, without a pipeline."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    outcome = Outcome([], [])
    for step in range(STEPS):
        batches = [batch for rank in range(case.dp) for batch in case.batches(step, rank)]
        denominator = sum(batch.scored for batch in batches)
        total = 0.0
        for batch in batches:
            with case.context():
                loss = model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens) / denominator
            loss.backward()
            total += loss.item()
        outcome.loss.append(total)
        outcome.states.append(finish(step, [model], optimizer))
        gradients = [t for name, t in outcome.states[-1].items() if name.startswith("gradient")]
        outcome.norms.append(float(sum(g.double().square().sum() for g in gradients)))
    outcome.evaluated = evaluate_alone(case, model)
    return outcome


def evaluate_alone(case: Case, model: Decoder) -> float:
    model.eval()
    batch = packed(77)
    with torch.no_grad(), case.context():
        return float(model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens))


def finish(
    step: int, models: list[Any], optimizer: torch.optim.Optimizer, mesh: Mesh | None = None
) -> dict[str, Tensor]:
    """One update; all that must be the same as on one rank. A tensor that two stages hold appears once: they must agree."""
    found: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        tensor = whole(tensor).detach().clone()
        assert name not in found or torch.equal(found[name], tensor), f"copies of {name} differ"
        found[name] = tensor

    for model in models:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            put(f"gradient {step} {name}", parameter.grad)
        for name, router in model.routers().items():
            if mesh is not None and mesh.group("dp_cp_tp") is not None:
                dist.all_reduce(router.load, group=mesh.group("dp_cp_tp"))  # the layer is on this stage's ranks only
            put(f"load {step} {name}", router.load)
            router.load.zero_()
    optimizer.step()
    optimizer.zero_grad()
    for model in models:
        for name, tensor in model.state_dict().items():
            put(f"after {step} {name}", tensor)
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_a_pipeline(rank: int, world: int, cases: list[Case]) -> list[Outcome]:
    return [_one(rank, world, case) for case in cases]


def _one(rank: int, world: int, case: Case) -> Outcome:
    mesh = Mesh(MeshConfig(pp=world // case.dp, dp=case.dp), Processes(rank, world, rank, torch.device("cpu")))
    plan, decoder = case.plan(mesh.size("pp")), case.model()
    parts = [Stage(decoder, plan.layers, index) for index in plan.held_by(mesh.rank("pp"))]
    names = {name for part in parts for name in part.state_dict()}
    if case.dp > 1:
        for part in parts:
            for block in part.layers():
                fully_shard(block, mesh=mesh.device_mesh("dp"), reshard_after_forward=False)
            fully_shard(part, mesh=mesh.device_mesh("dp"), reshard_after_forward=False)
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    runner = PipelineRunner(parts, plan, mesh)
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=0.01)
    outcome = Outcome([], [])
    for step in range(STEPS):
        batches = case.batches(step, mesh.rank("dp"))
        scored = sum(batch.scored for dp_rank in range(case.dp) for batch in case.batches(step, dp_rank))
        loss = runner.forward_backward(batches, scored, case.context)
        runner.sum_shared_gradients()
        outcome.loss += mesh.processes.sum([loss.item()])
        squares = 0.0
        for name, parameter in (named for part in parts for named in part.named_parameters()):
            assert parameter.grad is not None, name
            squares += whole(parameter.grad).double().square().sum().item() / runner.copies().get(name, 1)
        outcome.norms += [n / case.dp for n in mesh.processes.sum([squares])]
        outcome.states.append(finish(step, parts, optimizer, mesh))
    for part in parts:
        part.eval()
    with case.context():
        outcome.evaluated = mesh.processes.sum([runner.evaluate(packed(77)).item()])[0] / case.dp
    outcome.gathered = runner.gather(dict.fromkeys(names, rank))
    return outcome


def buffers_left(rank: int, world: int, case: Case) -> list[tuple[int, int]]:
    """(bytes of activations and gradients that stages hold between steps, tensors) after a step."""
    mesh = Mesh(MeshConfig(pp=world), Processes(rank, world, rank, torch.device("cpu")))
    plan, decoder = case.plan(world), case.model()
    parts: list[nn.Module] = [Stage(decoder, plan.layers, index) for index in plan.held_by(rank)]
    runner = PipelineRunner(parts, plan, mesh)
    runner.forward_backward(case.batches(0), 1.0)
    assert runner._ready is not None
    stages = runner._ready[1]
    infos = [i for s in stages for table in (s.args_recv_info, s.grad_recv_info) for row in table.values() for i in row]
    buffers = [info.buffer for info in infos if getattr(info, "buffer", None) is not None]
    return [(0 if buffer.is_meta else buffer.nbytes, buffer.numel()) for buffer in buffers]


def refused(rank: int, world: int, case: Case, micro_batches: int, lengths: tuple[int, ...]) -> str:
    """The message of the ValueError, or nothing."""
    mesh = Mesh(MeshConfig(pp=world), Processes(rank, world, rank, torch.device("cpu")))
    plan, decoder = case.plan(world), case.model()
    runner = PipelineRunner([Stage(decoder, plan.layers, i) for i in plan.held_by(rank)], plan, mesh)
    batches = [packed(index) for index in range(micro_batches)]
    batches = [Batch(b.tokens[:, :n], b.targets[:, :n], b.cu_seqlens) for b, n in zip(batches, lengths)]
    try:
        runner.forward_backward(batches, 1.0)
    except ValueError as error:
        return str(error)
    return ""
