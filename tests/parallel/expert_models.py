"""Whole models trained for a few steps on one rank and on many: what the ranks of test_expert_models.py do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.compilation import Programs, apply_compile
from parallel.context import apply_context, shard
from parallel.expert import apply_experts, share_loads, transport
from parallel.gradients import GradientRule
from parallel.layout import cuts
from parallel.mesh import Mesh, MeshConfig
from parallel.processes import Processes
from parallel.recompute import apply_recompute
from parallel.share import Share
from parallel.tensor import apply_tensor
from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.model.ffns.zaya_moe import ZayaMoEConfig
from pretrain.model.router import Balanced, Router
from pretrain.model.sequence import SequenceContext
from pretrain.model.sublayer import Carry
from pretrain.train.balance import Balance
from pretrain.train.callback import Run

ROWS, LENGTH = 4, 16
SPARSE: dict[str, dict[str, Any]] = {
    "top1": {"kind": "moe", "experts": 4, "top_k": 1, "hidden": 8, "normalize": False, "batch_loss": 0.1},
    "top2": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8, "shared_hidden": 8, "sequence_loss": 0.1, "bias_rate": 0.01},
    "top3": {
        "kind": "moe", "experts": 8, "top_k": 3, "hidden": 4, "shared_hidden": 8, "shared_gate": True, "gate": "softmax",
        "batch_loss": 0.1, "z_loss": 0.01, "bias_rate": 0.02,
    },
    "zaya": {"kind": "zaya_moe", "experts": 4, "top_k": 1, "hidden": 8, "router_width": 8, "skip": "zero"},
    "zaya2": {"kind": "zaya_moe", "experts": 4, "top_k": 2, "hidden": 8, "router_width": 8, "skip": "identity"},
    "union": {"kind": "union_of_experts", "experts": 4, "top_k": 2, "hidden": 32, "balance_loss": 0.1},
    "union_threshold": {
        "kind": "union_of_experts", "experts": 4, "select": "threshold", "mean_load": 0.5, "hidden": 32, "balance_loss": 0.1,
    },
}  # fmt: skip


def config(ffn: str) -> DecoderConfig:
    return DecoderConfig.model_validate(
        {
            "vocabulary": 32,
            "width": 16,
            "init_std": 0.3,
            "mixers": {"attention": {"kind": "attention", "heads": 2}},
            "ffns": {ffn: SPARSE[ffn]},
            "layers": [f"attention + {ffn} x2"],
        }
    )


def build(ffn: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config(ffn)).double().train()
    return with_skips(model)


def with_skips(model: nn.Module) -> Any:
    """Biases as in training, in fp32, and such that some tokens skip, in some rows more than in others."""
    for module in model.modules():
        if isinstance(module, Balanced):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.float() if buffer.is_floating_point() else buffer)
            if module.skips:
                cast(Tensor, module.bias)[-1] = 0.01
    return model


class Trained(NamedTuple):
    """After the steps: parameters and the first step's gradients, whole ones by name; the routers' biases; losses and records."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    biases: dict[str, Tensor]
    losses: list[float]
    records: list[dict[str, Any]]


def trained(
    rank: int,
    world: int,
    ffn: str,
    sizes: dict[str, Any],
    steps: int = 2,
    recompute: bool = False,
    fault: str = "",
    compiled: bool = False,
) -> Trained:
    """Steps of plain gradient descent. sizes: of the mesh. fault: something to get wrong on purpose."""
    job = Processes(rank, world, rank, torch.device("cpu"))
    mesh = Mesh(MeshConfig(**sizes), job)
    model = build(ffn)
    apply_tensor(model, mesh)
    apply_experts(model, mesh)
    apply_context(model, mesh)
    if fault != "local loads":
        share_loads(model, mesh)
    if compiled:
        apply_compile(model.blocks, "aot_eager")
    apply_recompute(model.blocks, "full" if recompute else "none")
    rule, table = GradientRule(model, mesh), cuts(model)
    balance = Balance(None if fault == "local biases" else mesh)
    if fault == "local biases":
        job = Processes(0, 1, 0, job.device)
    own = slice(mesh.rank("dp") * ROWS // mesh.size("dp"), (mesh.rank("dp") + 1) * ROWS // mesh.size("dp"))
    first: dict[str, Tensor] = {}
    losses, records = [], []
    for step in range(steps):
        tokens = torch.randint(0, 32, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))[own]
        loss = model(**_batch(tokens, mesh))
        (loss / (ROWS * LENGTH)).backward()
        for name, parameter in model.named_parameters():  # what the engine does
            over = mesh.group("dp_cp")
            if over is not None and parameter.grad is not None and not _shared_out(table.get(name, ())):
                dist.all_reduce(parameter.grad, group=over)
            elif fault == "scaled" and parameter.grad is not None and _shared_out(table.get(name, ())):
                parameter.grad *= mesh.size("ep")
        rule.reduce()
        run = SimpleNamespace(model=model, processes=job, record={"grad_norm": 1.0})
        balance.on_step(cast(Run, run))
        records.append(run.record)
        total = torch.tensor([loss.item()], dtype=torch.float64)
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        first = first or {name: _whole(p.grad, table.get(name, ()), name) for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
                    parameter.grad = None
    assert not compiled or Programs.so_far().graphs > 0
    parameters = {name: _whole(p, table.get(name, ()), name) for name, p in model.named_parameters()}
    biases = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith((".bias", ".threshold", ".bias_mean", ".load"))
    }
    return Trained(parameters, first, biases, losses, records)


def _batch(tokens: Tensor, mesh: Mesh) -> dict[str, Tensor]:
    """The decoder's arguments for rows tokens [B, T + 1]: with cp, packed in one row that is cut."""
    given = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    cp = mesh.size("cp")
    if cp == 1:
        return given
    borders = torch.arange(0, tokens.shape[0] * LENGTH + 1, LENGTH, dtype=torch.int32)
    cut = {name: shard(rows.reshape(1, -1), cp, mesh.rank("cp")) for name, rows in given.items()}
    return cut | {"cu_seqlens": borders}


def _shared_out(table: Any) -> bool:
    return any(cut.axis == "ep" for cut in table)


def _whole(tensor: Tensor | None, table: Any, name: str) -> Tensor:
    """The whole tensor, from all ranks' blocks; what several ranks hold must be the same on all of them."""
    assert tensor is not None, f"{name} has no gradient"
    tensor = tensor.detach()
    if not dist.is_initialized():
        return tensor.clone()
    share = Share.of(tensor, table, name)
    blocks = (
        [(box.whole, box.of(tensor).clone()) for box in share.boxes()]
        if isinstance(share, Share)
        else [((0,) * tensor.dim(), tensor.clone())]
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, blocks)
    whole = torch.full(tuple(share.shape), float("nan"), dtype=tensor.dtype)
    for each in everyone:
        for offsets, block in each:
            place = whole[tuple(slice(o, o + n) for o, n in zip(offsets, block.shape))]
            fresh = place.isnan().all()
            assert fresh or torch.allclose(place, block, rtol=1e-12, atol=1e-14), f"{name} differs among its holders"
            place.copy_(block)
    assert not whole.isnan().any(), f"nobody holds some of {name}"
    return whole


def traced(rank: int, world: int) -> dict[str, list[str]]:
    """The order of events in a layer with a shared expert: messages launched and awaited, and the shared expert's work."""
    events: list[str] = []
    launch, arrival = dist.all_to_all_single, transport._arrival

    def launched(*args: Any, **kwargs: Any) -> Any:
        events.append("launch" if kwargs.get("async_op") else "counts")
        return launch(*args, **kwargs)

    def noted(*args: Any) -> Callable[[], Tensor]:
        arrive = arrival(*args)

        def arriving() -> Tensor:
            events.append("wait")
            return arrive()

        return arriving

    dist.all_to_all_single, transport._arrival = launched, noted  # type: ignore[assignment]
    mesh = Mesh(MeshConfig(ep=world), Processes(rank, world, rank, torch.device("cpu")))
    model = build("top2")
    apply_experts(model, mesh)
    layer: Any = model.blocks[0].ffn
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.gate_up.weight.register_post_accumulate_grad_hook(lambda _: events.append("shared"))
    x = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, SequenceContext.of(torch.zeros(1, 8, dtype=torch.int64), None), None, Carry())
    forward = list(events)
    events.clear()
    y.sum().backward()
    return {"forward": forward, "backward": events}


def in_bf16(rank: int, world: int, ffn: str) -> dict[str, Tensor]:
    """Gradients under autocast, and the loss."""
    mesh = Mesh(MeshConfig(ep=world), Processes(rank, world, rank, torch.device("cpu")))
    model = build(ffn).float()
    apply_experts(model, mesh)
    share_loads(model, mesh)
    tokens = torch.randint(0, 32, (1, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_zaya_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    fields = {"experts": 4, "top_k": 2, "hidden": 8, "router_width": 8, "skip": "identity", "bias_lr": 0.1}
    layers = nn.ModuleList(ZayaMoEConfig(**fields).build(16) for _ in range(2))
    for index, layer in enumerate(layers):
        cast(Any, layer).place(index, 2)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.4)
    return with_skips(layers.double().train())


def through_zaya(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the stream, the router state) after layers that pass on their router's state."""
    sequence = SequenceContext.of(torch.zeros(x.shape[:2], dtype=torch.int64), None)
    carry = Carry()
    for layer in layers:
        y, carry = layer(x, sequence, None, carry)
        x = x + y
    assert carry.router_state is not None
    return x, carry.router_state


def zaya_slices(rank: int, world: int, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """[stream, router state, gradient of x] of this rank's slice along T, experts shared out over the ranks; gamma's gradient."""
    mesh = Mesh(MeshConfig(tp=world, ep=world), Processes(rank, world, rank, torch.device("cpu")))
    layers = two_zaya_layers()
    apply_experts(layers, mesh)
    own = x.chunk(world, dim=1)[rank].clone().requires_grad_()
    y, state = through_zaya(layers, own)
    (y * upstream.chunk(world, dim=1)[rank]).sum().backward()
    gamma: Any = layers[1].router.gamma
    assert own.grad is not None
    return [y.detach(), state.detach(), own.grad, gamma.grad]


def balanced_stages(rank: int, world: int, with_routers: tuple[int, ...]) -> tuple[dict[str, Any], list[float]]:
    """(record, bias) after balancing where each pipeline stage has a router of its own, or none."""
    job = Processes(rank, world, rank, torch.device("cpu"))
    router = Router(4, 2, 1, "sigmoid", 1.0, 0.5)
    router.load += torch.tensor([3, 1]) if rank == 0 else torch.tensor([0, 4])
    routers = {f"blocks.{rank}": router} if rank in with_routers else {}
    run = SimpleNamespace(model=SimpleNamespace(routers=lambda: routers), processes=job, record={"grad_norm": 1.0})
    Balance(Mesh(MeshConfig(pp=world), job)).on_step(cast(Run, run))
    return run.record, router.bias.tolist()
