"""Muon (K. Jordan et al. 2024; at scale: Liu et al. 2025, arXiv 2502.16982): momentum of matrices, orthogonalised.

    m <- mu m + g,    u = g + mu m (Nesterov) or m
    w <- (1 - lr decay) w - lr scale NS(u)

for each matrix of a parameter by itself (matrices.py); AdamW for everything else. Momentum and weights stay where they are,
sharded as they are. Only u travels, once, to the rank that orthogonalises it, and the result back (exchange.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from kernels.newton_schulz import newton_schulz
from kernels.newton_schulz.coefficients import Named
from parallel.config import Strict
from parallel.layout import cuts, local
from parallel.mesh import Mesh
from parallel.state import named_parameters
from pretrain.optim.adam import AdamPart
from pretrain.optim.adamw import split_by_decay
from pretrain.optim.exchange import Exchange, Part, Piece
from pretrain.optim.matrices import Described, Matrix, describe


class MuonConfig(Strict):
    kind: Literal["muon"] = "muon"
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate; the schedule scales it. With scaling=adamw_rms one that is right for AdamW is right here."""
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    """Orthogonalise the momentum as it will be after another such gradient."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; vectors, convolution taps, decay rates and the embedding never decay."""
    scaling: Literal["adamw_rms", "spectral"] = "adamw_rms"
    """Factor of a matrix's update. adamw_rms: 0.2 sqrt(max(inputs, outputs)), an update as large as AdamW's (arXiv 2502.16982).
    spectral: sqrt(max(1, outputs / inputs)), for learning rates around 0.02."""
    per_head: bool = False
    """Orthogonalise queries, keys and values of each head by themselves."""
    iteration: Named = "tuned"
    """The polynomials of the Newton-Schulz iteration (kernels/newton_schulz/coefficients.py)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the products in that iteration and of what ranks send each other for it. Momentum and weights are fp32."""
    bucket_bytes: int = Field(1 << 26, ge=1)
    """Matrices of so many bytes (one larger than that: alone) are orthogonalised by a rank while others are on their way."""
    adamw: list[str] = Field(default_factory=list)
    """Patterns (as "*.router.*") of names of further parameters that AdamW shall update; embedding, head, norms, vectors and
    convolutions are AdamW's anyway."""
    adamw_lr: float | None = Field(None, gt=0)
    """Peak learning rate of AdamW's parameters; lr when left out."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of AdamW, as beta2 and eps."""
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)

    def check(self, engine: str) -> None:
        """Raises ValueError for an engine that it does not work under."""
        if engine == "deepspeed":
            raise ValueError(
                "optimizer.kind=muon: the deepspeed engine updates flat partitions, in which a matrix has no shape and may lie "
                "on several ranks; use engine.kind=torch, which shards as much, or optimizer.kind=adamw"
            )

    def factory(self, model: nn.Module, mesh: Mesh | None = None) -> Callable[[nn.Module], Muon]:
        """What makes the optimizer of this rank's part of `model`, which is still whole. Collective over a pipeline stage."""
        return partial(self._build, matrices=describe(model, self.per_head, self.adamw), mesh=mesh)

    def build(self, model: nn.Module) -> Muon:
        """For a whole model on one rank."""
        return self.factory(model)(model)

    def _build(self, model: nn.Module, matrices: Described, mesh: Mesh | None) -> Muon:
        return Muon(self, model, matrices, mesh)

    def scale(self, matrix: Matrix) -> float:
        if self.scaling == "spectral":
            return math.sqrt(max(1.0, matrix.outputs / matrix.inputs))
        return 0.2 * math.sqrt(max(matrix.outputs, matrix.inputs))


class Muon(Optimizer):
    """matrices: of the whole model, of which `model` is this rank's part. Collective over the ranks of a pipeline stage."""

    def __init__(self, config: MuonConfig, model: nn.Module, matrices: Described, mesh: Mesh | None = None):
        named = [(name, parameter) for name, parameter in named_parameters(model) if parameter.requires_grad]
        names = {parameter: name for name, parameter in named}
        ours = [(name, parameter) for name, parameter in named if name in matrices]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for _, parameter in ours], "muon": True, "weight_decay": config.weight_decay}
        ]
        ratio = 1.0 if config.adamw_lr is None else config.adamw_lr / config.lr
        for parameters, decay in zip(split_by_decay(model), (config.weight_decay, 0.0)):
            others = [parameter for parameter in parameters if parameter.requires_grad and parameter in names]
            rest = [parameter for parameter in others if names[parameter] not in matrices]
            groups.append({"params": rest, "muon": False, "weight_decay": decay, "ratio": ratio})
        super().__init__([group for group in groups if group["params"]], {"lr": config.lr, "ratio": 1.0})
        self.config = config
        self.adam = AdamPart(config.beta1, config.beta2, config.eps)
        for group in self.param_groups:
            for parameter in group["params"]:
                # Now, not at the first step: so that it can be saved and loaded before.
                self.state[parameter] = (
                    {"momentum_buffer": torch.zeros_like(parameter.detach())}
                    if group["muon"]
                    else self.adam.state(parameter)
                )
        self.parameters = [parameter for _, parameter in ours]
        table = cuts(model)
        parts = [Part(parameter.detach(), table.get(name, ()), matrices[name]) for name, parameter in ours]
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        if any(parameter.dtype == torch.float64 for parameter in self.parameters):
            dtype = torch.float64
        ranks = None if mesh is None else mesh.group("dp_cp_tp")
        self.exchange = Exchange(parts, ranks, dtype, max(1, config.bucket_bytes // dtype.itemsize))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes the gradients"
        lr = next((float(group["lr"]) for group in self.param_groups if group["muon"]), 0.0)
        decay = next((group["weight_decay"] for group in self.param_groups if group["muon"]), 0.0)
        present = [parameter for parameter in self.parameters if parameter.grad is not None]
        weights, gradients, momenta = self._locals(present)
        if weights:
            torch._foreach_mul_(momenta, self.config.momentum)
            torch._foreach_add_(momenta, gradients)
            torch._foreach_mul_(weights, 1.0 - lr * decay)
        self.exchange.run(self._direction, self._orthogonalise, partial(self._apply, lr=lr), self._adamw)

    def _locals(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """This rank's own weights, gradients and momenta, as far as it has any."""
        weights = [local(parameter.detach()) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        return weights, gradients, [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]

    def _direction(self, index: int) -> Tensor:
        """What is orthogonalised, of this rank's part of a parameter; zero where there is no gradient."""
        parameter = self.parameters[index]
        momentum = local(self.state[parameter]["momentum_buffer"])
        if parameter.grad is None:
            return torch.zeros_like(momentum)
        if not self.config.nesterov:
            return momentum
        return torch.add(local(parameter.grad), momentum, alpha=self.config.momentum)

    def _orthogonalise(self, matrices: Tensor) -> Tensor:
        return newton_schulz(matrices, self.config.iteration)

    def _apply(self, pieces: list[Piece], results: list[Tensor], lr: float) -> None:
        weights = [self.parameters[piece.part].detach() for piece in pieces]
        chosen = [index for index, piece in enumerate(pieces) if self.parameters[piece.part].grad is not None]
        targets = [pieces[index].of(weights[index]) for index in chosen]
        if targets:
            updates = [results[index].to(targets[0].dtype) for index in chosen]
            torch._foreach_mul_(updates, [self.config.scale(pieces[index].matrix) for index in chosen])
            torch._foreach_add_(targets, updates, alpha=-lr)

    def _adamw(self) -> None:
        for group in self.param_groups:
            if not group["muon"]:
                self.adam.step(group["params"], self.state, group["lr"] * group["ratio"], group["weight_decay"])
