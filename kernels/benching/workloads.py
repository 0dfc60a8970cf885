"""What is timed: operators under the names of the layers that use them, with inputs like those of a trained model.

A shape is written B1T2048H4D128: batch, tokens, heads, head dimension (K128V256 where keys and values differ).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Any]  # tensors by the names of the public function's arguments; None where not given

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


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    B: int
    T: int
    H: int
    K: int
    V: int

    @staticmethod
    def parse(text: str) -> Shape:
        """B1T2048H4D128, or with K and V in place of D. Raises ValueError for anything else."""
        if not re.fullmatch(r"([BTHDKV]\d+)+", text):
            raise ValueError(f"{text!r} is not a shape; write B1T2048H4D128 (batch, tokens, heads, head dimension)")
        sizes = {letter: int(number) for letter, number in re.findall(r"([BTHDKV])(\d+)", text)}
        K, V = sizes.get("K", sizes.get("D", 0)), sizes.get("V", sizes.get("D", 0))
        shape = Shape(sizes.get("B", 1), sizes.get("T", 0), sizes.get("H", 1), K, V)
        if min(shape.B, shape.T, shape.H, K, V) < 1:
            raise ValueError(f"shape {text!r} lacks T or D, or has a size of 0; write for instance B1T2048H4D128")
        return shape

    def __str__(self) -> str:
        head = f"D{self.K}" if self.K == self.V else f"K{self.K}V{self.V}"
        return f"B{self.B}T{self.T}H{self.H}{head}"

    @property
    def tokens(self) -> int:
        return self.B * self.T


@dataclass(frozen=True)
class Workload:
    """One operator in one use.

    op: its folder in kernels/. inputs: (shape, dtype, device) -> arguments. call: the public function on them; returns
    the output whose gradient is taken.
    """

    name: str
    op: str
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    call: Callable[[Inputs], Tensor]


def leaves(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The inputs that want gradients, in order."""
    return [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]


def _generator(device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(0)


def _normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, device=device, generator=generator)


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device, key_heads: int | None = None) -> Inputs:
    """Random values, never zeros: constant data makes GPUs faster than they are. Keys and queries have unit length."""
    generator = _generator(device)
    H = shape.H if key_heads is None else key_heads
    qk = (shape.B, shape.T, H, shape.K)
    q, k = (F.normalize(_normal(qk, device, generator), dim=-1).to(dtype) for _ in range(2))
    v = _normal((shape.B, shape.T, shape.H, shape.V), device, generator).to(dtype)
    return {"q": q, "k": k, "v": v, "generator": generator}


def _finish(inputs: Inputs) -> Inputs:
    inputs.pop("generator", None)
    return {name: value.requires_grad_() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _log_decay(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Log decays as layers make them: between almost 0 and about -0.2 a token, fp32."""
    return F.logsigmoid(_normal(shape, device, generator) + 2) / 4


def _linear(gate: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = _qkv(shape, dtype, device)
        made["g"] = _gate(gate, shape, device, made["generator"])
        return _finish(made)

    return inputs


def _gate(gate: str, shape: Shape, device: torch.device, generator: torch.Generator | None) -> Tensor | None:
    if gate == "none":
        return None
    sizes = (shape.B, shape.T, shape.H) + ((shape.K,) if gate == "channel" else ())
    return _log_decay(sizes, device, generator)


def _delta(gate: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = _qkv(shape, dtype, device)
        made["beta"] = _normal((shape.B, shape.T, shape.H), device, made["generator"]).sigmoid()
        made["g"] = _gate(gate, shape, device, made["generator"])
        return _finish(made)

    return inputs


def _mamba2(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x, step sizes dt and decay rates A a head; B and C are shared by all heads."""
    made = _qkv(shape, dtype, device, key_heads=1)
    dt = F.softplus(_normal((shape.B, shape.T, shape.H), device, made["generator"]) - 2)
    A = -torch.rand((shape.H,), device=device, generator=made["generator"]) - 0.1
    return _finish({"x": made["v"], "dt": dt, "A": A, "B": made["k"], "C": made["q"]})


def _convolution(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = _generator(device)
    D = shape.H * shape.K
    x = _normal((shape.B, shape.T, D), device, generator).to(dtype)
    weight = (_normal((D, 4), device, generator) / 2).to(dtype)
    return _finish({"x": x, "weight": weight})


def _rows(gated: bool, heads: bool) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    """Norms: over the whole width of the model, or over one head (heads=True)."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = _generator(device)
        sizes = (shape.B, shape.T, shape.H, shape.K) if heads else (shape.B, shape.T, shape.H * shape.K)
        made: Inputs = {"x": _normal(sizes, device, generator).to(dtype)}
        if gated:
            made["gate"] = _normal(sizes, device, generator).to(dtype)
        made["weight"] = torch.ones(sizes[-1], device=device)
        return _finish(made)

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
