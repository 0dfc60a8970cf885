"""Who is timed on a workload: our own forms, and other people's implementations where they are installed.

Peers are called with their own layouts and conventions; conversions that a user of the peer would have to make are inside
the timed call. Nothing here is imported unless it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benching import compressed, dense, pointwise
from kernels.benching.workloads import Inputs, Shape, Workload
from kernels.dispatch import VARIABLE, Request, explain
from kernels.offline.choice import requested

FAMILIES = ("fla", "transformers", "torch")
LONGEST_LOOP = 2048  # tokens; a token loop keeps a state per token for its backward pass

Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """Something that computes a workload. objection: why it does not take part, or None."""

    name: str
    call: Call | None
    objection: str | None = None
    same: bool = True  # False for a yardstick that computes something else


@dataclass(frozen=True)
class Peer:
    """Another implementation. load imports it and returns the call; loop: it goes token by token."""

    family: str
    name: str
    devices: tuple[str, ...]
    load: Callable[[], Call]
    loop: bool = False
    usual: tuple[str, ...] = ("cpu", "cuda")  # elsewhere it takes part only where its family is asked for by name
    same: bool = True  # False for a yardstick that computes something else


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """Within this context operators use this form."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = form
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def verdicts(workload: Workload, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[tuple[str, str]]:
    """(form, verdict) for a workload, without making its tensors: see `kernels.dispatch.explain`."""
    inputs = workload.inputs(shape, dtype, torch.device("meta"))
    forms, request = requested(lambda: workload.call(inputs))
    return explain(forms, Request(request.op, device, request.dtype, request.shape, request.options))


def ours(
    workload: Workload, shape: Shape, dtype: torch.dtype, device: torch.device, *, reference: bool
) -> list[Contender]:
    """Our forms, the one that would serve first."""
    found = []
    for form, verdict in verdicts(workload, shape, dtype, device):
        if form == "reference" and not reference:
            continue
        able = verdict in ("chosen", "able")
        objection = None if able else verdict
        if able and form == "reference" and shape.T > LONGEST_LOOP:
            objection = f"a token loop: only up to T = {LONGEST_LOOP}"

        def call(inputs: Inputs, form: str = form) -> Tensor:
            with forced(form):
                return workload.call(inputs)

        found.append(Contender(f"braid {form}", call, objection))
    return found


def peers(workload: Workload, shape: Shape, device: torch.device, families: tuple[str, ...] | None) -> list[Contender]:
    """The peers of a workload. families: those asked for by name; None for all usual ones."""
    found = []
    for peer in PEERS.get(workload.name, ()):
        if device.type not in peer.devices or (
            peer.family not in families if families else device.type not in peer.usual
        ):
            continue
        name = f"{peer.family} {peer.name}"
        if peer.loop and shape.T > LONGEST_LOOP:
            found.append(Contender(name, None, f"a token loop: only up to T = {LONGEST_LOOP}"))
            continue
        try:
            found.append(Contender(name, peer.load(), same=peer.same))
        except Exception as error:  # a peer may fail to import in many ways; none of them is our failure
            found.append(Contender(name, None, f"not usable: {type(error).__name__}: {error}"[:160]))
    return found


def _attribute(path: str) -> Callable[..., object]:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _peer(path: str, adapt: Callable[[Callable, Inputs], Tensor]) -> Callable[[], Call]:
    """Loads the function at `path`; `adapt` calls it with a workload's inputs and returns the output."""

    def load() -> Call:
        # transformers hides its torch forms behind wrappers that call fla or mamba_ssm where those are installed.
        function = inspect.unwrap(_attribute(path))
        return lambda inputs: adapt(function, inputs)

    return load


def _fla(path: str, adapt: Callable[[Callable, Inputs], Tensor], *, loop: bool = False) -> Peer:
    devices = ("cpu",) if path.split(".")[-2] == "naive" else ("cuda",)
    return Peer("fla", path.split(".")[-1], devices, _peer(path, adapt), loop)


def _transformers(path: str, adapt: Callable[[Callable, Inputs], Tensor]) -> Peer:
    """transformers' plain-torch forms: what its models run where no kernels are installed.

    Not usual on GPUs: at the shapes timed there they hold tens of gigabytes.
    """
    load = _peer(f"transformers.models.{path}", adapt)
    return Peer("transformers", path.split(".")[-1], ("cpu", "cuda"), load, usual=("cpu",))


def _qkvg(function: Callable, i: Inputs) -> Tensor:
    return function(i["q"], i["k"], i["v"], g=i["g"])[0]


def _chunk_linear(function: Callable, i: Inputs) -> Tensor:
    out = function(i["q"], i["k"], i["v"])
    return out[0] if isinstance(out, tuple) else out


def _delta(function: Callable, i: Inputs) -> Tensor:
    return function(i["q"], i["k"], i["v"], g=i["g"], beta=i["beta"])[0]


def _delta_ungated(function: Callable, i: Inputs) -> Tensor:
    return function(i["q"], i["k"], i["v"], beta=i["beta"])[0]


def _heads_first(function: Callable, i: Inputs) -> Tensor:
    q, k, v, beta = (i[name].transpose(1, 2) for name in ("q", "k", "v", "beta"))
    return function(q, k, v, beta)[0].transpose(1, 2)


def _gla_loop(function: Callable, i: Inputs) -> Tensor:
    return function(i["q"], i["k"], i["v"], i["g"])[0]


def _ssd(function: Callable, i: Inputs) -> Tensor:
    return function(i["x"], i["dt"], i["A"], i["B"], i["C"], 256)


def _simple_gla_ssd(function: Callable, i: Inputs) -> Tensor:
    """Mamba-2 by an operator without shared key heads."""
    x, dt = i["x"], i["dt"]
    heads = x.shape[2]
    q, k = (i[name].repeat_interleave(heads, dim=2) for name in ("C", "B"))
    return function(q, k, (x * dt[..., None]).to(x.dtype), g=dt * i["A"], scale=1.0)[0]


def _qkv_unnormalized(function: Callable, i: Inputs) -> Tensor:
    return function(i["q"], i["k"], i["v"], normalize=False)[0]


def _torch(name: str, call: Call) -> Peer:
    return Peer("torch", name, ("cpu", "cuda"), lambda: call)


def _softmax(i: Inputs) -> Tensor:
    """Causal softmax attention of the same shape: another operator, the yardstick that published tables use."""
    q, k, v = (i[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != v.shape[1])


def _conv1d(i: Inputs) -> Tensor:
    x, weight = i["x"], i["weight"]
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=x.shape[2])).transpose(1, 2)


def _rms(i: Inputs) -> Tensor:
    return F.rms_norm(i["x"], i["x"].shape[-1:], i["weight"].to(i["x"].dtype), 1e-6)


def _gated_rms(i: Inputs) -> Tensor:
    return _rms(i) * F.silu(i["gate"])


def _fla_convolution(function: Callable, i: Inputs) -> Tensor:
    return function(i["x"], i["weight"], activation="silu")[0]


# On a CPU softmax attention takes minutes at T = 8192.
_YARDSTICK = Peer("torch", "softmax attention", ("cpu", "cuda"), lambda: _softmax, usual=("cuda",), same=False)

PEERS: dict[str, tuple[Peer, ...]] = {
    "linear_attention": (
        _fla("fla.ops.linear_attn.chunk_linear_attn", _qkv_unnormalized),
        _fla("fla.ops.linear_attn.naive.naive_chunk_linear_attn", _chunk_linear),
        _YARDSTICK,
    ),
    "simple_gla": (
        _fla("fla.ops.simple_gla.chunk_simple_gla", _qkvg),
        _fla("fla.ops.simple_gla.naive.naive_chunk_simple_gla", _qkvg),
        _YARDSTICK,
    ),
    "gla": (
        _fla("fla.ops.gla.chunk_gla", _qkvg),
        _fla("fla.ops.gla.naive.naive_recurrent_gla", _gla_loop, loop=True),
        _YARDSTICK,
    ),
    "mamba2": (
        _fla("fla.ops.simple_gla.chunk_simple_gla", _simple_gla_ssd),
        _transformers("mamba2.modeling_mamba2.mamba2_chunk_scan", _ssd),
    ),
    "delta_net": (
        _fla("fla.ops.delta_rule.chunk_delta_rule", _delta_ungated),
        _fla("fla.ops.delta_rule.naive.delta_rule_chunkwise", _heads_first),
        _YARDSTICK,
    ),
    "gated_delta_net": (
        _fla("fla.ops.gated_delta_rule.chunk_gated_delta_rule", _delta),
        _fla("fla.ops.gated_delta_rule.naive.naive_chunk_gated_delta_rule", _delta),
        _transformers("qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule", _delta),
        _YARDSTICK,
    ),
    "kda": (
        _fla("fla.ops.kda.chunk_kda", _delta),
        _fla("fla.ops.kda.naive.naive_chunk_kda", _delta),
        _transformers("kimi_linear.modeling_kimi_linear.chunk_kimi_delta_attention", _delta),
        _YARDSTICK,
    ),
    "short_convolution": (
        _torch("conv1d + silu", _conv1d),
        _fla("fla.modules.causal_conv1d.causal_conv1d", _fla_convolution),
    ),
    "rms_norm": (_torch("rms_norm", _rms),),
    "gated_rms_norm": (_torch("rms_norm * silu", _gated_rms),),
    "add_rms_norm": (_torch("add, rms_norm", pointwise.added),),
    "rotary": (_torch("rotate_half", pointwise.rotate_half),),
    "rotary_interleaved": (_torch("complex product", pointwise.complex_product),),
    "swiglu": (_torch("silu * up", pointwise.gated),),
    "rational": (_torch("Horner's rule", pointwise.fraction),),
    "attention": (_torch("sdpa", dense.sdpa), _torch("softmax(q k) v", dense.written_out)),
    "sliding_attention": (_torch("sdpa, masked", dense.sdpa), _torch("softmax(q k) v", dense.written_out)),
    "experts": (_torch("a loop over experts", dense.expert_loop), _torch("grouped_mm", dense.grouped)),
    "linear_cross_entropy": (_torch("all logits", dense.all_logits),),
    "cca": (_torch("conv1d, conv1d, norms", compressed.convolutions),),
}
