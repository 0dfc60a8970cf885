"""What is timed: operators under the names of the layers that use them, with inputs like those of a trained model.

A shape is written B1T2048H4D128: batch, tokens, heads, head dimension (K128V256 where keys and values differ).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benching import compressed, dense, pointwise
from kernels.benching.shapes import Inputs, Shape, Workload, finish, generator_of, leaves, normal

__all__ = ["CPU_SHAPES", "GPU_SHAPES", "WORKLOADS", "Inputs", "Shape", "Workload", "chosen", "leaves"]

# The CPU pair shows whether time grows in proportion to length. The GPU list is that of the table of timings which
# flash-linear-attention publishes, so that figures can be laid side by side.
CPU_SHAPES = ("B1T2048H4D128", "B1T8192H4D128")
GPU_SHAPES = (
    "B1T8192H96D128",
    "B2T16384H16D128",
    "B4T2048H16D128",
    "B4T4096H64D128",
    "B8T1024H8D64",
    "B8T2048H32D256",
)


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device, key_heads: int | None = None) -> Inputs:
    """Random values, never zeros: constant data makes GPUs faster than they are. Keys and queries have unit length."""
    generator = generator_of(device)
    H = shape.H if key_heads is None else key_heads
    qk = (shape.B, shape.T, H, shape.K)
    q, k = (F.normalize(normal(qk, device, generator), dim=-1).to(dtype) for _ in range(2))
    v = normal((shape.B, shape.T, shape.H, shape.V), device, generator).to(dtype)
    return {"q": q, "k": k, "v": v, "generator": generator}


def _log_decay(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Log decays as layers make them: between almost 0 and about -0.2 a token, fp32."""
    return F.logsigmoid(normal(shape, device, generator) + 2) / 4


def _linear(gate: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = _qkv(shape, dtype, device)
        made["g"] = _gate(gate, shape, device, made["generator"])
        return finish(made)

    return inputs


def _gate(gate: str, shape: Shape, device: torch.device, generator: torch.Generator | None) -> Tensor | None:
    if gate == "none":
        return None
    sizes = (shape.B, shape.T, shape.H) + ((shape.K,) if gate == "channel" else ())
    return _log_decay(sizes, device, generator)


def _delta(gate: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = _qkv(shape, dtype, device)
        made["beta"] = normal((shape.B, shape.T, shape.H), device, made["generator"]).sigmoid()
        made["g"] = _gate(gate, shape, device, made["generator"])
        return finish(made)

    return inputs


def _mamba2(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x, step sizes dt and decay rates A a head; B and C are shared by all heads."""
    made = _qkv(shape, dtype, device, key_heads=1)
    dt = F.softplus(normal((shape.B, shape.T, shape.H), device, made["generator"]) - 2)
    A = -torch.rand((shape.H,), device=device, generator=made["generator"]) - 0.1
    return finish({"x": made["v"], "dt": dt, "A": A, "B": made["k"], "C": made["q"]})


def _convolution(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = generator_of(device)
    D = shape.H * shape.K
    x = normal((shape.B, shape.T, D), device, generator).to(dtype)
    weight = (normal((D, 4), device, generator) / 2).to(dtype)
    return finish({"x": x, "weight": weight})


def _rows(gated: bool, heads: bool) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    """Norms: over the whole width of the model, or over one head (heads=True)."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = generator_of(device)
        sizes = (shape.B, shape.T, shape.H, shape.K) if heads else (shape.B, shape.T, shape.H * shape.K)
        made: Inputs = {"x": normal(sizes, device, generator).to(dtype)}
        if gated:
            made["gate"] = normal(sizes, device, generator).to(dtype)
        made["weight"] = torch.ones(sizes[-1], device=device)
        return finish(made)

    return inputs


def _call_linear(inputs: Inputs) -> Tensor:
    from kernels.gated_linear_attention import gated_linear_attention

    return gated_linear_attention(**inputs)[0]


def _call_mamba2(inputs: Inputs) -> Tensor:
    from kernels.gated_linear_attention import gated_linear_attention

    x, dt = inputs["x"], inputs["dt"]
    v = (x * dt[..., None]).to(x.dtype)
    return gated_linear_attention(inputs["C"], inputs["B"], v, dt * inputs["A"], scale=1.0)[0]


def _call_delta(inputs: Inputs) -> Tensor:
    from kernels.delta_rule import delta_rule

    return delta_rule(**inputs)[0]


def _call_convolution(inputs: Inputs) -> Tensor:
    from kernels.short_conv import short_convolution

    return short_convolution(**inputs, activation="silu")[0]


def _call_rms_norm(inputs: Inputs) -> Tensor:
    from kernels.norm import rms_norm

    return rms_norm(inputs["x"], inputs["weight"], 1e-6)


def _call_gated_norm(inputs: Inputs) -> Tensor:
    from kernels.norm import gated_rms_norm

    return gated_rms_norm(inputs["x"], inputs["gate"], inputs["weight"], 1e-6)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("linear_attention", "gated_linear_attention", _linear("none"), _call_linear),
        Workload("simple_gla", "gated_linear_attention", _linear("head"), _call_linear),
        Workload("gla", "gated_linear_attention", _linear("channel"), _call_linear),
        Workload("mamba2", "gated_linear_attention", _mamba2, _call_mamba2),
        Workload("delta_net", "delta_rule", _delta("none"), _call_delta),
        Workload("gated_delta_net", "delta_rule", _delta("head"), _call_delta),
        Workload("kda", "delta_rule", _delta("channel"), _call_delta),
        Workload("short_convolution", "short_conv", _convolution, _call_convolution),
        Workload("rms_norm", "norm", _rows(gated=False, heads=False), _call_rms_norm),
        Workload("gated_rms_norm", "norm", _rows(gated=True, heads=True), _call_gated_norm),
        *pointwise.WORKLOADS,
        *dense.WORKLOADS,
        *compressed.WORKLOADS,
    )
}


def chosen(names: list[str]) -> list[Workload]:
    """Workloads by their own names or by the folder of their operator; all of them for an empty list.

    Raises ValueError for an unknown name.
    """
    if not names:
        return list(WORKLOADS.values())
    found: dict[str, Workload] = {}
    for name in names:
        matching = [workload for workload in WORKLOADS.values() if name in (workload.name, workload.op)]
        if not matching:
            folders = sorted({workload.op for workload in WORKLOADS.values()})
            raise ValueError(f"{name!r} is not timed; choose among {', '.join([*WORKLOADS, *folders])}")
        found.update({workload.name: workload for workload in matching})
    return list(found.values())
