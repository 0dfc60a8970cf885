"""LAMB (You et al. 2020, arXiv 1904.00962): Adam's update, scaled for each layer to the size of its weights.

    r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay w
    w <- w - lr (||w|| / ||r||) r

A layer is a parameter, and each expert of a stack one by itself. The factor ("trust ratio") is one where a norm is zero, and for
norms, biases, taps and rates, as the authors' code has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from parallel.layout import Box, boxes, cuts, local
from parallel.mesh import Mesh
from parallel.state import named_parameters
from pretrain.optim.adamw import split_by_decay
from pretrain.optim.moments import MomentsConfig


class LAMBConfig(MomentsConfig):
    kind: Literal["lamb"] = "lamb"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; the schedule scales it. An update is this share of a layer's weights."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of that mean."""
    weight_decay: float = Field(0.1, ge=0)
    """Added to the update before it is scaled; of matrices only, as AdamW's."""
    largest: float | None = Field(10.0, gt=0)
    """Trust ratios above it count as this; null for no limit."""

    def check(self, engine: str) -> None:
        """Raises ValueError for an engine that it does not work under."""
        if engine == "deepspeed":
            raise ValueError(
                "optimizer.kind=lamb: the deepspeed engine updates flat partitions, which know no layers to take norms of; use "
                "engine.kind=torch, or optimizer.kind=adamw"
            )

    def factory(self, model: nn.Module, mesh: Mesh | None = None) -> Callable[[nn.Module], LAMB]:
        """What makes the optimizer of this rank's part of `model`, which is still whole."""
        return partial(self._build, mesh=mesh)

    def build(self, model: nn.Module) -> LAMB:
        """For a whole model on one rank."""
        return LAMB(self, model)

    def _build(self, model: nn.Module, mesh: Mesh | None) -> LAMB:
        return LAMB(self, model, mesh)


class _Layer(NamedTuple):
    """A block of this rank's own tensor of a parameter that lies in one layer.

    slot: the layer's place among all. share: one over the number of ranks that hold the block, of those whose norms are added up.
    """

    box: Box
    slot: int
    share: float


class LAMB(Optimizer):
    """model: this rank's part. `step` is collective over the ranks of a pipeline stage.

    `ratios` holds the trust ratios of the latest step, fp64, by the layers' slots; `layers` names them.
    """

    def __init__(self, config: LAMBConfig, model: nn.Module, mesh: Mesh | None = None):
        named = {parameter: name for name, parameter in named_parameters(model)}
        decayed, others = ([p for p in each if p.requires_grad and p in named] for each in split_by_decay(model))
        tables = [parameter for parameter in others if named[parameter].endswith("embedding.weight")]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay, "trust": True},
            {"params": tables, "weight_decay": 0.0, "trust": True},
            {"params": [p for p in others if p not in set(tables)], "weight_decay": 0.0, "trust": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": config.lr})
        self.config = config
        self.group = None if mesh is None else mesh.group("dp_cp_tp")
        ranks = 1 if mesh is None else mesh.size("dp_cp_tp")
        table = cuts(model)
        self.layers: list[str] = []
        self.blocks: dict[Tensor, list[_Layer]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                # Now, not at the first step: so that it can be saved and loaded before.
                zero = torch.zeros_like(parameter.detach())
                self.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero.clone()}
                if group["trust"]:
                    name = named[parameter]
                    self.blocks[parameter] = self._blocks(name, parameter, table.get(name, ()), ranks)
        self.ratios = torch.ones(len(self.layers), dtype=torch.float64)

    def _blocks(self, name: str, parameter: Tensor, each: Any, ranks: int) -> list[_Layer]:
        """Names the parameter's layers, and says where this rank's blocks of them lie."""
        shape = list(parameter.shape)
        for cut in each:
            shape[cut.split.dim] = cut.split.whole()
        first = len(self.layers)
        stack = len(shape) > 2
        self.layers += [f"{name}[{index}]" for index in range(shape[0])] if stack else [name]
        parts = _shards(parameter) * math.prod(cut.ranks for cut in each)
        found = []
        for box in boxes(parameter, each):
            share = parts / (ranks * box.copies)
            if not stack:
                found.append(_Layer(box, first, share))
                continue
            for index in range(box.sizes[0]):
                one = Box(
                    (box.local[0] + index, *box.local[1:]),
                    (box.whole[0] + index, *box.whole[1:]),
                    (1, *box.sizes[1:]),
                    box.copies,
                )
                found.append(_Layer(one, first + one.whole[0], share))
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes the gradients"
        updates: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    updates[parameter] = self._update(parameter, group["weight_decay"])
        self.ratios = self._ratios(updates)
        ratios = self.ratios.tolist()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update, weight = updates.pop(parameter), local(parameter.detach())
                for layer in self.blocks.get(parameter, ()):
                    layer.box.of(update).mul_(ratios[layer.slot])
                weight.add_(update, alpha=-float(group["lr"]))

    def _update(self, parameter: Tensor, weight_decay: float) -> Tensor:
        """r of this rank's own part, and the moments one step on."""
        state, config = self.state[parameter], self.config
        assert parameter.grad is not None
        gradient, weight = local(parameter.grad), local(parameter.detach())
        first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
        state["step"] += 1
        step = float(state["step"])
        first.lerp_(gradient, 1 - config.beta1)
        second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        root = (second / (1 - config.beta2**step)).sqrt_().add_(config.eps)
        return (first / (1 - config.beta1**step)).div_(root).add_(weight, alpha=weight_decay)

    def _ratios(self, updates: dict[Tensor, Tensor]) -> Tensor:
        """||w|| / ||r|| of every layer, the same bits on all ranks."""
        device = next((update.device for update in updates.values()), torch.device("cpu"))
        sums = torch.zeros(2, len(self.layers), dtype=torch.float64, device=device)
        for parameter, layers in self.blocks.items():
            if parameter not in updates:
                continue
            for layer in layers:
                for row, tensor in enumerate((local(parameter.detach()), updates[parameter])):
                    sums[row, layer.slot] += layer.share * layer.box.of(tensor).double().square().sum()
        if self.group is not None:
            # Gathered and added up here, in the order of the ranks: two stages that hold a copy each of one parameter come to
            # the same bits, whatever else their sums are made of.
            every = [torch.empty_like(sums) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(every, sums, group=self.group)
            sums = torch.stack(every).sum(0)
        weights, norms = sums.sqrt().unbind(0)
        ratios = torch.where((weights > 0) & (norms > 0), weights / norms.clamp_min(1e-300), 1.0)
        return ratios if self.config.largest is None else ratios.clamp_max(self.config.largest)


def _shards(parameter: Tensor) -> int:
    """Into how many parts the engine has cut a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, each in enumerate(parameter.placements) if isinstance(each, Shard))
