"""ZAYA1's router (arXiv 2511.17127 and 2605.05365): a small network on a state that runs along depth, and a controlled bias.

    r_l = W_down x_l + b_down + gamma_l * r_{l-1}                      (no gamma in the first routing layer)
    p = softmax(W_3 GELU(W_2 GELU(W_1 RMSNorm(r_l) + b_1) + b_2))
    e = argmax(p + bias),   weight p_e

The weight is the plain probability: neither the bias nor a normalisation over the chosen enters it. The bias belongs to a
controller, AdamW on the pseudo-gradient (share of tokens sent to e) - (target share of e), which is 1 / E when all are equal.
The papers give no constants for it; the defaults are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import rms_norm
from kernels.experts import load, route
from pretrain.model.norm import RMSNorm
from pretrain.model.router import Balanced

SKIP_START = -1.0  # below every probability: nobody skips before the controller has moved the biases


@dataclass(frozen=True)
class Controller:
    """AdamW on the bias. target: the share of tokens that each choice should get, summing to 1."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    target: tuple[float, ...]
    eps: float = 1e-8


class ZayaRouter(Balanced):
    """(x [B, T, D], the previous router's state or None) -> (indices int64 [N, k], scores fp32 [N, k], state fp32 [B, T, R]).

    There are as many choices as the controller has targets: the experts, and with one more choice a last one that means skip.
    """

    bias: Tensor
    bias_mean: Tensor
    """fp32 [C], the controller's first moment; saved with the model, like its second moment and its count of steps."""
    bias_square: Tensor
    bias_steps: Tensor

    def __init__(self, width: int, experts: int, top_k: int, state: int, norm_eps: float, controller: Controller):
        super().__init__()
        choices = len(controller.target)
        self.skips = choices - experts
        assert self.skips in (0, 1)
        self.experts, self.top_k, self.controller = experts, top_k, controller
        self.down = nn.Linear(width, state)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(state))
        self.norm = RMSNorm(state, norm_eps)
        self.fc1 = nn.Linear(state, state)
        self.fc2 = nn.Linear(state, state)
        self.out = nn.Linear(state, choices, bias=False)
        for name in ("bias", "bias_mean", "bias_square"):
            self.register_buffer(name, torch.zeros(choices))
        self.register_buffer("bias_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("load", torch.zeros(choices, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The controller at rest, the skip choice out of reach."""
        for buffer in (self.bias, self.bias_mean, self.bias_square, self.bias_steps):
            buffer.zero_()
        self.bias[self.experts :] = SKIP_START

    def forward(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # fp32 (or wider) whatever the autocast: a rounded logit would choose another expert.
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            state = _linear(self.down, x.to(wide))
            if self.gamma is not None and previous is not None:
                if previous.shape != state.shape:
                    raise ValueError(
                        f"router_width={state.shape[-1]}, but the routing layer before has {previous.shape[-1]}; "
                        "all zaya_moe layers of a model need the same router_width"
                    )
                state = state + self.gamma.to(wide) * previous.to(wide)
            else:
                state = (
                    state.clone()
                )  # it leaves the layer, which is to return no view (see Carry.apart), as a linear does
            h = rms_norm(state, self.norm.weight.to(wide), self.norm.eps)
            h = functional.gelu(_linear(self.fc1, h))
            h = functional.gelu(_linear(self.fc2, h))
            indices, scores = route(_linear(self.out, h).flatten(0, -2), self.bias, top_k=self.top_k)
        if self.training:
            self.load += load(indices, self.load.numel())
        return indices, scores, state

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        self.load.zero_()
        if not load.any():
            return
        c = self.controller
        share = load.float() / load.sum()
        gradient = share - torch.tensor(c.target, device=load.device)
        self.bias_steps += 1
        self.bias_mean.lerp_(gradient, 1 - c.beta1)
        self.bias_square.lerp_(gradient.square(), 1 - c.beta2)
        mean = self.bias_mean / (1 - c.beta1**self.bias_steps)
        square = self.bias_square / (1 - c.beta2**self.bias_steps)
        self.bias.mul_(1 - c.lr * c.weight_decay).sub_(c.lr * mean / (square.sqrt() + c.eps))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in x's dtype, whatever dtype its weights are kept in."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, layer.weight.to(x.dtype), bias)
