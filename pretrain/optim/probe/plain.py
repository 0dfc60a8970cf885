"""What each optimizer shall do to one whole parameter: the formulas in fp64, written here a second time and for one rank only.

Nothing of the optimizers' own code is used, so that an error there cannot be here as well. What is shared is the description of
where matrices lie in a fused parameter (pretrain/optim/matrices.py); which parameters are matrices is decided here again.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.newton_schulz import COEFFICIENTS
from pretrain.optim.matrices import Matrix

TAPS = {"conv", "depthwise", "grouped", "A_log"}


class Expected(NamedTuple):
    """weight: after the step, fp64. rule: which formula. directions: for Muon, of each matrix what is orthogonalised, and the
    factor of the result in the update. ratios: for LAMB, of each layer."""

    weight: Tensor
    rule: str
    directions: list[tuple[Matrix, Tensor, float]] | None = None
    ratios: list[float] | None = None


class Plain:
    """The optimizer that `config` names, for the parameters of a whole model. It keeps its own moments, in fp64, from zero on."""

    def __init__(self, config: Any, model: nn.Module, matrices: dict[str, tuple[Matrix, ...]]):
        self.config, self.matrices = config, matrices
        self.state: dict[str, dict[str, Any]] = {}
        self.tables = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) or name.rpartition(".")[2] == "head"
        }
        self.embeddings = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }

    def rule(self, name: str, weight: Tensor) -> str:
        """The formula for a parameter of a model: muon, adamw, lamb or sgd."""
        if self.config.kind != "muon":
            return str(self.config.kind)
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.config.adamw)
        matrix = (
            weight.dim() >= 2 and min(weight.shape[-2:]) > 1 and not self._vectors(name) and name not in self.tables
        )
        return "muon" if matrix and not chosen else "adamw"

    def _vectors(self, name: str) -> bool:
        own = name.rpartition(".")[2]
        return own in TAPS or own.endswith("bias")

    def _decay(self, name: str, weight: Tensor) -> float:
        taps = name.rpartition(".")[2] in TAPS
        return self.config.weight_decay if weight.dim() >= 2 and not taps and name not in self.embeddings else 0.0

    def step(self, name: str, weight: Tensor, gradient: Tensor, lr: float) -> Expected:
        """One step of one parameter; w and g whole, any dtype."""
        w, g = weight.double(), gradient.double()
        state = self.state.setdefault(name, {"t": 0, "m": torch.zeros_like(w), "v": torch.zeros_like(w)})
        state["t"] += 1
        rule, decay = self.rule(name, weight), self._decay(name, weight)
        made: Expected = getattr(self, f"_{rule}")(name, w, g, state, lr, decay)
        return made

    def _adam(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        c, t = self.config, state["t"]
        state["m"] = c.beta1 * state["m"] + (1 - c.beta1) * g
        state["v"] = c.beta2 * state["v"] + (1 - c.beta2) * g * g
        return state["m"] / (1 - c.beta1**t) / ((state["v"] / (1 - c.beta2**t)).sqrt() + c.eps)

    def _adamw(self, name: str, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, decay: float) -> Expected:
        rate = lr
        if self.config.kind == "muon" and self.config.adamw_lr is not None:
            rate = lr * self.config.adamw_lr / self.config.lr
        return Expected(w - rate * decay * w - rate * self._adam(g, state), "adamw")

    def _sgd(self, name: str, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, decay: float) -> Expected:
        g = g + decay * w
        state["m"] = self.config.momentum * state["m"] + g
        return Expected(w - lr * (g + self.config.momentum * state["m"] if self.config.nesterov else state["m"]), "sgd")

    def _lamb(self, name: str, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, decay: float) -> Expected:
        r = self._adam(g, state) + decay * w
        if not (decay or name in self.embeddings or (w.dim() >= 2 and name.rpartition(".")[2] not in TAPS)):
            return Expected(w - lr * r, "lamb")
        after, ratios = w.clone(), []
        for index in range(w.shape[0]) if w.dim() > 2 else [slice(None)]:
            size, length = w[index].norm().item(), r[index].norm().item()
            ratio = size / length if size > 0 and length > 0 else 1.0
            ratios.append(ratio if self.config.largest is None else min(ratio, self.config.largest))
            after[index] -= lr * ratios[-1] * r[index]
        return Expected(after, "lamb", ratios=ratios)

    def _muon(self, name: str, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, decay: float) -> Expected:
        state["m"] = self.config.momentum * state["m"] + g
        direction = g + self.config.momentum * state["m"] if self.config.nesterov else state["m"]
        after, found = w - lr * decay * w, []
        for matrix in self.matrices.get(name, ()):
            place = tuple(slice(start, start + size) for start, size in zip(matrix.offsets, matrix.sizes))
            one = direction[place].reshape(matrix.sizes[-2:])
            if self.config.scaling == "adamw_rms":
                factor = 0.2 * math.sqrt(max(matrix.outputs, matrix.inputs))
            else:
                factor = math.sqrt(max(1.0, matrix.outputs / matrix.inputs))
            after[place] -= lr * factor * orthogonal(one, self.config.iteration).view(matrix.sizes)
            found.append((matrix, one, lr * factor))
        return Expected(after, "muon", directions=found)


def orthogonal(x: Tensor, iteration: str) -> Tensor:
    """The polynomials on the singular values of x over its Frobenius norm. x [m, n] fp64."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / x.norm().clamp_min(1e-15)
    for a, b, c in COEFFICIENTS[iteration]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt
