"""What linear-time mixers share: low-rank projections, initial laws, and the frame of a mixer with a state [K, V]
per head (`LinearMixer`, `DeltaMixer`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kernels import (
    delta_rule,
    gated_rms_norm,
    rms_norm,
)
from pretrain.model.norm import norm_of_part
from pretrain.model.sequence import Cache, SequenceContext
from pretrain.model.split import Section, Split, columns, rows
from pretrain.model.sublayer import Mixer, linear_flops, require

Activation = Literal["silu", "sigmoid"]

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # step sizes at initialisation, log-uniform (Mamba, section 3.6)


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least: what gates, decays and step sizes are computed in, whatever the autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LowRank(nn.Module):
    """x [..., D] -> up(down(x)) [..., out] through `rank` channels."""

    def __init__(self, width: int, rank: int, out: int, bias: bool = False):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


@torch.no_grad()
def draw_taps(weight: Tensor, bias: Tensor | None = None) -> None:
    """The law of torch's Conv1d for a depthwise kernel [C, W]; the bias starts at zero."""
    bound = 1.0 / math.sqrt(weight.shape[1])
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.zero_()


@torch.no_grad()
def draw_rates(A_log: Tensor, low: float, high: float = 16.0) -> None:
    """Decay rates exp(A_log) uniform in (low, high); a rate of 0 has no logarithm."""
    A_log.uniform_(low, high).clamp_(min=1e-4).log_()


@torch.no_grad()
def draw_steps(dt_bias: Tensor) -> None:
    """Biases whose softplus is a step size, log-uniform between DT_MIN and DT_MAX."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_().clamp_(min=DT_FLOOR)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class Heads(NamedTuple):
    """Sizes of a state per value head: `heads` query/key heads of `key` channels, `value_heads` of `value` channels."""

    heads: int
    value_heads: int
    key: int
    value: int

    @property
    def key_width(self) -> int:
        return self.heads * self.key

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value


def grouped_heads(heads: int, value_heads: int | None, key: int, value: int | None) -> Heads:
    """Heads with `value_heads` a multiple of `heads` (the same number when None) and `value` = `key` when None."""
    count = value_heads or heads
    require(count % heads == 0, f"value_heads={count} is not a multiple of heads={heads}; choose a multiple")
    return Heads(heads, count, key, value or key)


def split_width(heads: int, width: int, key: int | None, value: int | None, expand: tuple[float, float]) -> Heads:
    """Heads that share `width` channels, times expand for keys and for values, unless their sizes are given."""

    def size(given: int | None, field: str, times: float) -> int:
        if given is not None:
            return given
        total = round(width * times)
        require(
            total % heads == 0 and total >= heads,
            f"heads={heads} does not divide {times:g} * width = {total}; set {field} or change heads",
        )
        return total // heads

    return Heads(heads, heads, size(key, "head_dim", expand[0]), size(value, "value_dim", expand[1]))


class LinearMixer(Mixer):
    """q, k, v of one projection, optionally convolved -> recurrence -> RMSNorm, times an output gate -> out.

    A subclass implements `recurrence`. It may assign `self.gate`, a module x -> logits [B, T, HV * V] that pass through
    `gate_activation` and multiply the normalised output.
    """

    gate: nn.Module | None
    conv: nn.Parameter | None
    gate_activation: Activation = "silu"
    conv_activation: str | None = "silu"
    # Per state entry: decay (1), write (2), read (2). A chunked form does a few more; counting the definition keeps MFU
    # comparable between forms.
    flops_per_entry = 5.0

    def __init__(self, width: int, sizes: Heads, conv_width: int, norm_eps: float, norm_size: int | None = None):
        """conv_width: taps, 0 for no convolution; norm_size: channels normalised together, a value head's if left out."""
        super().__init__()
        self.heads, self.value_heads, self.head_dim, self.value_dim = sizes
        self.sections = (sizes.key_width, sizes.key_width, sizes.value_width)
        self.norm_eps, self.norm_size = norm_eps, norm_size or sizes.value
        self.qkv = nn.Linear(width, sum(self.sections), bias=False)
        self.gate = None
        self.conv = nn.Parameter(torch.empty(sum(self.sections), conv_width)) if conv_width else None
        self.norm = nn.Parameter(torch.ones(self.norm_size))
        self.out = nn.Linear(sizes.value_width, width, bias=False)
        if self.conv is not None:
            draw_taps(self.conv)

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        """x [B, T, D], q and k [B, T, H, K], v [B, T, HV, V] -> o [B, T, HV, V]."""
        raise NotImplementedError

    def forward(self, x: Tensor, sequence: SequenceContext, cache: Cache = None) -> Tensor:
        mixed = self.qkv(x)
        if self.conv is not None:
            mixed = sequence.convolve(mixed, self.conv, None, self.conv_activation, cache)
        q, k, v = mixed.split(self.sections, dim=-1)
        q, k = (part.unflatten(-1, (self.heads, self.head_dim)) for part in (q, k))
        o = self.recurrence(x, q, k, v.unflatten(-1, (self.value_heads, self.value_dim)), sequence, cache)
        return self.out(self._normalise(o.flatten(-2), x))

    def _normalise(self, o: Tensor, x: Tensor) -> Tensor:
        groups = (-1, self.norm_size)
        if self.norm_size > o.shape[-1]:  # all channels together, of which this module holds a part
            assert self.gate is None
            return norm_of_part(o, self.norm, self.norm_eps, self.norm_size, self.across)
        o = o.unflatten(-1, groups)
        if self.gate is None:
            return rms_norm(o, self.norm, self.norm_eps).flatten(-2)
        gate = self.gate(x).unflatten(-1, groups)
        return gated_rms_norm(o, gate, self.norm, self.norm_eps, activation=self.gate_activation).flatten(-2)

    def flops_per_token(self, context: float) -> float:
        dense = linear_flops(*(part.weight for part in self.modules() if isinstance(part, nn.Linear)))
        taps = 0.0 if self.conv is None else 2.0 * self.conv.numel()
        return dense + taps + self.flops_per_entry * self.value_heads * self.head_dim * self.value_dim

    def output_projections(self) -> list[Tensor]:
        return [self.out.weight]

    def head_sections(self) -> tuple[Section, Section]:
        """How queries or keys, and how values are cut: by heads; a key head that serves several parts is held by each."""
        heads, values = self.heads, self.value_heads
        key = Section(heads * self.head_dim, heads, "heads", shared=heads < values)
        return key, Section(values * self.value_dim, values, "value_heads" if heads < values else "heads")

    def splits(self) -> dict[str, Split]:
        key, value = self.head_sections()
        splits = rows(self.qkv, "qkv", key, key, value) | columns("out", value)
        if self.conv is not None:
            splits["conv"] = Split(0, (key, key, value))
        if self.norm_size != self.value_dim:
            splits["norm"] = Split(0, (value,))
        return splits if self.gate is None else splits | last_rows(self.gate, "gate", value)

    def shrink(self, rank: int, ranks: int) -> None:
        self.heads, self.value_heads = max(1, self.heads // ranks), self.value_heads // ranks
        key = self.heads * self.head_dim
        self.sections = (key, key, self.value_heads * self.value_dim)


def last_rows(projection: nn.Module, name: str, section: Section) -> dict[str, Split]:
    """A linear or low-rank projection cut by its outputs; what leads to the few channels in the middle stays whole."""
    if isinstance(projection, LowRank):
        return rows(projection.up, f"{name}.up", section)
    assert isinstance(projection, nn.Linear)
    return rows(projection, name, section)


class DeltaMixer(LinearMixer):
    """A LinearMixer by the delta rule, with unit q and k and a write strength beta per value head.

    A subclass overrides `log_decay` to forget as well.
    """

    flops_per_entry = 6.0  # read of the old value (2), write (2), read (2)

    def __init__(self, width: int, sizes: Heads, conv_width: int, norm_eps: float, negative_eigenvalues: bool):
        super().__init__(width, sizes, conv_width, norm_eps)
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.beta = nn.Linear(width, sizes.value_heads, bias=False)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """x [B, T, D] -> natural logarithm of the decay, <= 0, fp32 [B, T, HV] or [B, T, HV, K]; None for no decay."""
        return None

    def recurrence(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceContext, cache: Cache) -> Tensor:
        beta = torch.sigmoid(wide(self.beta(x))) * self.beta_scale
        return sequence.recur(delta_rule, q, k, v, beta, self.log_decay(x), cache=cache, normalize_qk=True)

    def splits(self) -> dict[str, Split]:
        return super().splits() | rows(self.beta, "beta", self.per_value_head())

    def per_value_head(self, channels: int = 1) -> Section:
        """How something with as many channels for each value head is cut."""
        return self.head_sections()[1].of(self.value_heads * channels)
