"""Union of MLP experts (Yang et al. 2025, arXiv 2503.02495): a dense feed-forward cut into shards, of which each token uses some.

    E_i(x) = phi(x W1_i [+ b1_i]) W2_i [+ b2_i],   W1 cut by columns, W2 by rows
    y_t = sum over the selected i of E_i(x_t)

The sum is not weighted: with all experts selected it is the dense block, and a dense checkpoint cut into shards starts as
itself (pretrain/model/union_conversion.py). Which experts a token uses: pretrain/model/union.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import experts
from kernels.common.opaque import opaque
from pretrain.model.ffns.mlp import MLPConfig
from pretrain.model.ffns.routed import Dispatcher, expert_splits
from pretrain.model.ffns.swiglu import SwiGLUConfig
from pretrain.model.router import unreduced
from pretrain.model.sequence import SequenceContext
from pretrain.model.split import Section, Split
from pretrain.model.sublayer import Carry, ContextualFFN, FFNConfig, linear_flops, require
from pretrain.model.union import RoutingConfig, Selection
from pretrain.model.union_rows import Rows, per_expert

Activation = Literal["swiglu", "gelu", "relu"]
_ELEMENTWISE: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class UnionOfExpertsConfig(RoutingConfig, FFNConfig):
    kind: Literal["union_of_experts"] = "union_of_experts"
    hidden: int = Field(ge=1)
    """Width of the whole hidden layer, as in the dense block."""
    experts: int = Field(ge=1)
    """Shards, a divisor of hidden."""
    activation: Activation = "swiglu"
    """swiglu is a gated unit with three matrices, gelu and relu are plain two-layer networks."""
    bias: bool = False
    """Biases on both layers. Each expert adds its own output bias."""
    balance_loss: float = Field(0.0, ge=0)
    """Weight of the switch loss, per token and level."""

    def build(self, width: int) -> UnionOfExperts:
        return UnionOfExperts(width, self)

    def dense(self) -> SwiGLUConfig | MLPConfig:
        """The config of the dense block. Raises ValueError where the model has no such block."""
        if self.activation != "swiglu":
            return MLPConfig(hidden=self.hidden, activation=self.activation, bias=self.bias)
        require(not self.bias, "bias=True with activation=swiglu has no dense feed-forward here; leave bias out")
        return SwiGLUConfig(hidden=self.hidden)


class UnionOfExperts(ContextualFFN):
    fixed_memory = False

    routes_by_token = False  # but by patches, and by what came before
    reads_wide = True
    own: slice | None = None  # in a part: its experts among all

    def __init__(self, width: int, config: UnionOfExpertsConfig):
        super().__init__()
        n, hidden = config.experts, config.hidden
        divisors = ", ".join(str(i) for i in range(1, min(hidden, 1024) + 1) if hidden % i == 0)
        require(hidden % n == 0, f"experts={n} does not divide hidden={hidden}; choose one of {divisors}")
        self.experts = n
        self.activation, self.balance_loss = config.activation, config.balance_loss
        self.gated = config.activation == "swiglu"
        self.routing = config.routing(width, n)
        inner = hidden // n * (2 if self.gated else 1)
        self.up = nn.Parameter(torch.empty(n, width, inner))  # gated: the gate's columns first
        self.down = nn.Parameter(torch.empty(n, hidden // n, width))
        self.up_bias = nn.Parameter(torch.zeros(n, inner)) if config.bias else None
        self.down_bias = nn.Parameter(torch.zeros(n, width)) if config.bias else None
        self.dispatch: Dispatcher = experts
        self.reduce_load: Callable[[Tensor], Tensor] = unreduced
        """int64 [n] -> its sum over the ranks that share a global batch, for balance_loss; called once a level."""

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        # The law of the dense block, not of the shards' own shapes.
        self.up.normal_(0.0, std)
        self.down.normal_(0.0, std)

    @opaque  # who takes how much differs from row to row
    def forward(
        self, x: Tensor, sequence: SequenceContext, cache: dict[str, Any] | None, carry: Carry
    ) -> tuple[Tensor, Carry]:
        selection = self.routing(x, sequence, cache)
        if self.training and self.balance_loss and selection.levels:
            carry = carry.add(self.balance_loss * x.shape[0] * x.shape[1] * selection.imbalance(self.reduce_load))
        selection = selection if self.own is None else selection.of(self.own)
        tokens = x.flatten(0, 1)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        run = self._through_kernel if self.up_bias is None else self._plain
        return run(tokens, selection).view(x.shape), carry

    def _through_kernel(self, tokens: Tensor, selection: Selection) -> Tensor:
        """tokens [N, D] -> [N, D] through the kernel."""
        factor = selection.factor.flatten(0, 1)
        # Dispatchers to other ranks know gated experts only: see expert_splits.
        dispatch: Callable[..., Tensor] = self.dispatch
        dispatch = dispatch if self.gated else partial(dispatch, activation=self.activation)
        if selection.indices is not None:
            indices = selection.indices.flatten(0, 1)
            return dispatch(tokens, self.up, self.down, indices, factor.gather(-1, indices))
        # Tokens with different numbers of experts: every pair is a row with one choice.
        rows = Rows.of(selection.mask.flatten(0, 1))
        pairs = (rows.expert[:, None], rows.of_pairs(factor)[:, None])
        return rows.combine(dispatch(rows.of_tokens(tokens), self.up, self.down, *pairs))

    def _plain(self, tokens: Tensor, selection: Selection) -> Tensor:
        """tokens [N, D] -> [N, D]; the kernel has no biases."""
        rows = Rows.of(selection.mask.flatten(0, 1))
        factor = rows.of_pairs(selection.factor.flatten(0, 1)).to(tokens.dtype)[:, None]
        inner = per_expert(rows.of_tokens(tokens), self.up, rows.counts)
        if self.up_bias is not None:
            inner = inner + self.up_bias.to(inner.dtype)[rows.expert]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = _ELEMENTWISE[self.activation](inner)
        y = per_expert(hidden, self.down, rows.counts)
        if self.down_bias is not None:
            y = y + self.down_bias.to(y.dtype)[rows.expert]
        return rows.combine(y * factor)

    def flops_per_token(self, context: float) -> float:
        shards = linear_flops(self.up, self.down) * self.experts / self.up.shape[0]
        return self.routing.share(context) * shards + self.routing.flops_per_token()

    def active_parameters(self) -> int:
        routers = sum(parameter.numel() for parameter in self.routing.parameters())
        shards = sum(parameter.numel() for parameter in self.parameters()) - routers
        return routers + round(self.routing.mean_share * shards * self.experts / self.up.shape[0])

    def output_projections(self) -> list[Tensor]:
        return [self.down]

    def expert_splits(self) -> dict[str, tuple[Split, ...]]:
        """As for the layers of RoutedFFN. Raises ValueError for experts that the dispatcher does not compute."""
        require(
            self.gated and self.up_bias is None,
            f"experts with activation={self.activation} and bias={self.up_bias is not None} stay together on a rank; "
            "choose activation=swiglu and bias=false, or mesh.ep=1",
        )
        return expert_splits("up", "down", self.experts, self.down.shape[1])

    def end_to_end(self) -> dict[str, tuple[int, list[int]]]:
        """Parameters that hold several matrices end to end: the dim, and the matrices' lengths along it."""
        return {"up": (2, [self.up.shape[2] // 2] * 2)} if self.gated else {}

    def splits(self) -> dict[str, Split]:
        experts = Split(0, (Section.even(self.up.shape[0], "experts"),))
        biases = {} if self.up_bias is None else {"up_bias": experts, "down_bias": experts}
        return {"up": experts, "down": experts} | biases

    def shrink(self, rank: int, ranks: int) -> None:
        own = self.experts = self.up.shape[0]
        self.own = slice(rank * own, (rank + 1) * own)
        self.balance_loss /= ranks  # every part computes all of it
        if rank > 0:
            self.routing.silence()
