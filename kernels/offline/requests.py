"""The representative calls of every operator that has a Triton form.

What decides the code that is compiled: gate kind, head dimensions, dtype, packed or dense, and whether sizes are
multiples of 16 (Triton specialises on that). Lengths and head counts matter only where they decide which kernels run, so
they are small here; nothing runs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
LONG = 2048  # tokens that are cut into segments where there are few heads
SHORT = {BF16: "bf16", FP32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One call of a public operator, forward and backward.

    run: makes the tensors and returns (differentiable outputs, inputs that want gradients).
    required: False where the Triton form may decline, for instance a head dimension of 256.
    """

    op: str
    name: str
    run: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    required: bool = True

    def __call__(self) -> None:
        outputs, inputs = self.run()
        if not inputs:  # an operator without a gradient
            return
        # Contiguous gradients, as a model gives them: those of .sum() would have stride 0.
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs], allow_unused=True)


def leaf(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def offsets(T: int) -> Tensor:
    """Three packed sequences, the first not a multiple of any chunk."""
    return torch.tensor([0, 37, T // 2, T], dtype=torch.int32)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _gate(kind: str, B: int, T: int, H: int, K: int) -> Tensor | None:
    return {"none": lambda: None, "head": lambda: leaf(B, T, H), "channel": lambda: leaf(B, T, H, K)}[kind]()


def _delta_rule(
    gate: str, K: int, V: int, dtype: torch.dtype, *, T: int = 256, H: int = 16, HV: int = 16, packed: bool = False
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.delta_rule import delta_rule

        B = 1 if packed else 2
        q, k, v = leaf(B, T, H, K, dtype=dtype), leaf(B, T, H, K, dtype=dtype), leaf(B, T, HV, V, dtype=dtype)
        beta, g = leaf(B, T, HV), _gate(gate, B, T, HV, K)
        state = leaf(3, HV, K, V) if packed else None
        o, final = delta_rule(
            q,
            k,
            v,
            beta,
            g,
            initial_state=state,
            output_final_state=packed,
            cu_seqlens=offsets(T) if packed else None,
            normalize_qk=not packed,
        )
        return _present(o, final), _present(q, k, v, beta, g, state)

    return Case("delta_rule", _label(gate, K, V, dtype, packed, T, HV // H), run, required=max(K, V) <= 128)


def _gated_linear_attention(
    gate: str, K: int, V: int, dtype: torch.dtype, *, T: int = 256, H: int = 16, HV: int = 16, packed: bool = False
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.gated_linear_attention import gated_linear_attention

        B = 1 if packed else 2
        q, k, v = leaf(B, T, H, K, dtype=dtype), leaf(B, T, H, K, dtype=dtype), leaf(B, T, HV, V, dtype=dtype)
        g = _gate(gate, B, T, HV, K)
        state = leaf(3, HV, K, V) if packed else None
        o, final = gated_linear_attention(
            q,
            k,
            v,
            g,
            initial_state=state,
            output_final_state=packed,
            cu_seqlens=offsets(T) if packed else None,
        )
        return _present(o, final), _present(q, k, v, g, state)

    name = _label(gate, K, V, dtype, packed, T, HV // H)
    return Case("gated_linear_attention", name, run, required=max(K, V) <= 128)


def _label(gate: str, K: int, V: int, dtype: torch.dtype, packed: bool, T: int, groups: int) -> str:
    words = [f"g={gate}", f"K{K}", f"V{V}", SHORT[dtype]]
    words += ["packed"] * packed + [f"T{T}"] * (T != 256) + [f"HV=H*{groups}"] * (groups > 1)
    return " ".join(words)


def _short_convolution(
    D: int, W: int, dtype: torch.dtype, activation: str | None, *, bias: bool, packed: bool, T: int = 256
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.short_conv import short_convolution

        B = 1 if packed else 2
        x, weight = leaf(B, T, D, dtype=dtype), leaf(D, W, dtype=dtype)
        b = leaf(D, dtype=dtype) if bias else None
        state = leaf(3, D, W - 1, dtype=dtype) if packed else None
        y, final = short_convolution(
            x,
            weight,
            b,
            activation=activation,
            initial_state=state,
            output_final_state=packed,
            cu_seqlens=offsets(T) if packed else None,
        )
        return _present(y, final), _present(x, weight, b, state)

    words = [f"D{D}", f"W{W}", SHORT[dtype], activation or "linear"] + ["packed"] * packed + [f"T{T}"] * (T % 16 != 0)
    return Case("short_conv", " ".join(words), run)


def _norm(function: str, D: int, dtype: torch.dtype, rows: int = 512, norm_first: bool = True) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels import norm

        x = leaf(rows, D, dtype=dtype)
        if function == "l2_norm":
            return [norm.l2_norm(x, 1e-6)], [x]
        weight = leaf(D)
        if function == "rms_norm":
            return [norm.rms_norm(x, weight, 1e-6)], [x, weight]
        if function == "add_rms_norm":  # as under autocast: a sublayer's output, and the stream in fp32
            residual = leaf(rows, D)
            return list(norm.add_rms_norm(x, residual, weight, 1e-6)), [x, residual, weight]
        gate = leaf(rows, D, dtype=dtype)
        y = norm.gated_rms_norm(x, gate, weight, 1e-6, activation="silu", norm_first=norm_first)
        return [y], [x, gate, weight]

    order = "" if function != "gated_rms_norm" or norm_first else " gate first"
    return Case("norm", f"{function} D{D} {SHORT[dtype]}{order}", run)


def _swiglu(H: int, dtype: torch.dtype, rows: int = 512) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.swiglu import swiglu

        x = leaf(rows, 2 * H, dtype=dtype)
        return [swiglu(x)], [x]

    return Case("swiglu", f"H{H} {SHORT[dtype]}", run)


def _rational(
    D: int,
    dtype: torch.dtype,
    groups: int = 8,
    *,
    shared: bool = True,
    orders: tuple[int, int] = (5, 4),
    rows: int = 512,
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.rational import rational

        x = leaf(rows, D, dtype=dtype)
        numerator, denominator = leaf(1 if shared else groups, orders[0] + 1), leaf(groups, orders[1])
        return [rational(x, numerator, denominator)], [x, numerator, denominator]

    words = [f"D{D}", f"G{groups}", f"orders {orders[0]}/{orders[1]}", SHORT[dtype]] + ["shared numerator"] * shared
    return Case("rational", " ".join(words), run)


def _rotary(
    K: int, R: int, dtype: torch.dtype, *, interleaved: bool = False, packed: bool = False, H: int = 8, T: int = 256
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.rotary import rotary

        x = leaf(2, T, H, K, dtype=dtype)
        angles = torch.zeros(T, R // 2) if packed else torch.zeros(2, T, 1, R // 2)
        positions = torch.zeros(2, T, dtype=torch.int64) if packed else None
        return [rotary(x, angles, angles.clone(), positions=positions, interleaved=interleaved)], [x]

    words = [f"K{K}", f"R{R}", SHORT[dtype], "interleaved" if interleaved else "halves"]
    return Case("rotary", " ".join(words + ["packed"] * packed + [f"H{H}"] * (H != 8)), run)


def _cca(
    H: int,
    HKV: int,
    d: int,
    dtype: torch.dtype,
    *,
    taps: int = 2,
    packed: bool = False,
    continued: bool = False,
    T: int = 256,
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.cca import cca

        C, J = (H + HKV) * d, H + HKV
        z = leaf(1 if packed else 2, T, C, dtype=dtype)
        parameters = [leaf(C, taps), leaf(C), leaf(J, taps * d, d), leaf(C), leaf(HKV)]
        state = leaf(3, 2 * taps - 2, C, dtype=dtype) if continued else None
        q, k, _ = cca(z, *parameters, initial_state=state, cu_seqlens=offsets(T) if packed else None)
        return [q, k], _present(z, *parameters, state)

    words = [f"H{H}", f"HKV{HKV}", f"d{d}", SHORT[dtype]] + [f"{taps} taps"] * (taps != 2)
    words += ["packed"] * packed + ["continued"] * continued
    return Case("cca", " ".join(words + [f"T{T}"] * (T % 16 != 0)), run)


def _newton_schulz(B: int, m: int, n: int, dtype: torch.dtype) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.newton_schulz import newton_schulz

        return [newton_schulz(torch.zeros(B, m, n, dtype=dtype))], []

    return Case("newton_schulz", f"{B} of {m} x {n} {SHORT[dtype]}", run)


def _experts(
    N: int,
    E: int,
    D: int,
    F: int,
    k: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    weights: torch.dtype | None = None,
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.experts import experts

        x, scores = leaf(N, D, dtype=dtype), leaf(N, k)
        gate_up, down = (leaf(E, *shape, dtype=weights or dtype) for shape in ((D, 2 * F if gated else F), (F, D)))
        indices = torch.zeros(N, k, dtype=torch.int64)
        y = experts(x, gate_up, down, indices, scores, activation="silu" if gated else "relu2")
        return [y], [x, gate_up, down, scores]

    words = [f"{k} of {E}", f"D{D}", f"F{F}", SHORT[dtype], f"N{N}"] + ["plain"] * (not gated)
    return Case("experts", " ".join(words if weights is None else [*words, "weights", SHORT[weights]]), run)


def _routing(N: int, E: int, k: int, gate: str, *, groups: int = 1, top_groups: int = 1) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.experts import route

        logits = leaf(N, E)
        normalize = k > 1
        _, weights = route(
            logits, torch.zeros(E), top_k=k, gate=gate, normalize=normalize, groups=groups, top_groups=top_groups
        )
        return [weights], [logits]

    return Case("experts", f"routing {k} of {E} {gate}" + f" {top_groups} of {groups} groups" * (groups > 1), run)


def _cross_entropy(
    V: int, dtype: torch.dtype, *, bias: bool = False, smooth: float = 0.0, reduction: str = "sum", N: int = 300
) -> Case:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        from kernels.cross_entropy import linear_cross_entropy

        x, weight = leaf(N, 16, dtype=dtype), leaf(V, 16, dtype=dtype)
        b, targets = leaf(V) if bias else None, torch.zeros(N, dtype=torch.int64)
        loss = linear_cross_entropy(
            x, weight, targets, bias=b, z_loss=1e-4, label_smoothing=smooth, reduction=reduction
        )
        return [loss], _present(x, weight, b)

    words = [f"V{V}", SHORT[dtype], reduction] + ["bias"] * bias + ["smoothed"] * (smooth > 0)
    return Case("cross_entropy", " ".join(words), run)


def cases(op: str) -> list[Case]:
    """The calls that must compile for `op`, a folder of kernels/. Empty for an operator this file does not know."""
    if op == "delta_rule":
        gates = ("none", "head", "channel")
        return [
            *(_delta_rule(gate, D, D, BF16) for gate in gates for D in (64, 128, 256)),
            *(_delta_rule(gate, 128, 128, BF16, packed=True) for gate in gates),
            *(_delta_rule(gate, 64, 64, FP32) for gate in gates),
            _delta_rule("head", 128, 128, FP32),
            _delta_rule("head", 128, 256, BF16),
            _delta_rule("head", 128, 128, BF16, HV=32),
            _delta_rule("head", 64, 64, BF16, T=250, H=3, HV=3),
            _delta_rule("head", 128, 80, BF16),  # values that no descriptor can cut
            # One head and many tokens: scans over segments, which are joined.
            *(_delta_rule(gate, 128, 128, BF16, T=LONG, H=1, HV=1) for gate in gates),
            _delta_rule("head", 128, 128, BF16, T=LONG, H=1, HV=1, packed=True),
            _delta_rule("head", 64, 64, BF16, T=LONG, H=1, HV=1),
            _delta_rule("head", 64, 64, FP32, T=LONG, H=1, HV=1),
        ]
    if op == "gated_linear_attention":
        gates = ("none", "head", "channel")
        return [
            *(_gated_linear_attention(gate, D, D, BF16) for gate in gates for D in (64, 128, 256)),
            *(_gated_linear_attention(gate, 128, 128, BF16, packed=True) for gate in gates),
            *(_gated_linear_attention(gate, 64, 64, FP32) for gate in gates),
            _gated_linear_attention("channel", 128, 128, FP32),
            _gated_linear_attention("head", 128, 64, BF16, H=1),  # Mamba-2: one key head for all value heads
            _gated_linear_attention("channel", 64, 64, BF16, T=250, H=3, HV=3),
            *(_gated_linear_attention(gate, 128, 128, BF16, T=LONG, H=1, HV=1) for gate in gates),
            _gated_linear_attention("head", 128, 128, BF16, T=LONG, H=1, HV=1, packed=True),
            _gated_linear_attention("head", 64, 64, FP32, T=LONG, H=1, HV=1),
        ]
    if op == "short_conv":
        return [
            _short_convolution(2048, 4, BF16, "silu", bias=False, packed=False),
            _short_convolution(2048, 4, BF16, "silu", bias=True, packed=True),
            _short_convolution(2048, 4, FP32, None, bias=True, packed=False),
            _short_convolution(1000, 3, BF16, None, bias=False, packed=False, T=250),
        ]
    if op == "norm":
        return [
            *(_norm("rms_norm", D, dtype) for D in (128, 2048, 4096) for dtype in (BF16, FP32)),
            *(_norm("l2_norm", D, BF16) for D in (64, 128)),
            *(_norm("gated_rms_norm", D, BF16, norm_first=first) for D in (128, 2048) for first in (True, False)),
            _norm("rms_norm", 1000, BF16, rows=250),
            *(_norm("add_rms_norm", D, dtype) for D in (2048, 4096) for dtype in (BF16, FP32)),
            _norm("add_rms_norm", 1000, BF16, rows=250),
        ]
    if op == "experts":
        return [
            _experts(4096, 16, 2048, 2048, 1, BF16, weights=FP32),  # ZAYA1
            _experts(4096, 128, 2048, 768, 8, BF16),  # Qwen3-MoE
            _experts(1024, 64, 1024, 512, 4, BF16, gated=False),
            _experts(8, 128, 2048, 768, 8, BF16),  # decoding
            _experts(2048, 8, 1024, 512, 2, FP32),
            _experts(500, 6, 1000, 333, 3, BF16),
            _routing(4096, 17, 1, "softmax"),  # ZAYA1
            _routing(4096, 128, 8, "softmax"),
            _routing(4096, 256, 8, "sigmoid", groups=8, top_groups=4),  # DeepSeek-V3
        ]
    if op == "cross_entropy":
        return [
            *(_cross_entropy(V, dtype) for V in (512, 65536) for dtype in (BF16, FP32)),
            _cross_entropy(50257, BF16),
            _cross_entropy(32768, BF16, bias=True, smooth=0.1, reduction="none"),
        ]
    if op == "swiglu":
        return [
            *(_swiglu(H, dtype) for H in (1408, 8192) for dtype in (BF16, FP32)),
            _swiglu(1001, BF16, rows=250),
        ]
    if op == "rational":
        return [
            *(_rational(D, dtype) for D in (768, 4096) for dtype in (BF16, FP32)),
            _rational(64, BF16),
            _rational(3072, BF16, shared=False),
            _rational(1001, BF16, 7, orders=(3, 2), rows=250),
        ]
    if op == "rotary":
        return [
            *(_rotary(128, 128, dtype, interleaved=pairs) for dtype in (BF16, FP32) for pairs in (False, True)),
            *(_rotary(256, 64, BF16, interleaved=pairs) for pairs in (False, True)),
            *(_rotary(64, 64, BF16, interleaved=pairs, packed=True) for pairs in (False, True)),
            _rotary(80, 20, BF16, H=3, T=250),
        ]
    if op == "cca":
        return [
            *(_cca(8, 2, d, BF16) for d in (64, 128, 256)),
            *(_cca(8, 2, d, FP32) for d in (64, 128, 256)),
            _cca(8, 2, 128, BF16, packed=True),
            *(_cca(8, 2, 128, dtype, packed=True, continued=True) for dtype in (BF16, FP32)),
            _cca(4, 4, 32, BF16, taps=4, packed=True, continued=True),
            _cca(3, 1, 80, BF16, T=250),
        ]
    if op == "newton_schulz":
        shapes = [(2, 1024, 4096, BF16), (1, 1024, 1024, BF16), (1, 1000, 333, BF16), (1, 256, 512, FP32)]
        return [_newton_schulz(*shape) for shape in shapes]
    return []
