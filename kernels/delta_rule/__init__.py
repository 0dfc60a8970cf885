"""The delta rule: linear attention whose state forgets the old value of a key before it writes the new one.

One operator serves three published layers, told apart by the log decay g alone:

* g None              DeltaNet        (Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484)
* g [B, T, HV]        Gated DeltaNet  (Yang et al. 2024, arXiv:2412.06464)
* g [B, T, HV, K]     KDA             (Kimi Linear, arXiv:2510.26692)
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.delta_rule.decode import delta_rule_step
from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.packing import check_cu_seqlens

__all__ = ["FORMS", "delta_rule", "delta_rule_step", "request"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    if objection is not None:
        return objection
    if importlib.util.find_spec("kernels.delta_rule.triton") is None:
        return "this build has no Triton form of the delta rule"
    if request.shape["K"] > 256:
        return f"K = {request.shape['K']}: the Triton form holds a key dimension of at most 256"
    return None


FORMS = (
    Form("triton", "kernels.delta_rule.triton", "delta_rule_triton", _triton_why_not),
    Form("chunked", "kernels.delta_rule.chunked", "delta_rule_chunked"),
    Form("reference", "kernels.delta_rule.reference", "delta_rule_reference"),
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The (gated) delta rule over a sequence. Per head and step, with the state S [K, V]:

        S̃ = exp(g_t) S_{t-1};   S_t = S̃ + β_t k_t (v_t − S̃ᵀ k_t)ᵀ;   o_t = scale · S_tᵀ q_t

    q, k            [B, T, H, K]
    v               [B, T, HV, V], HV a multiple of H; value head j reads query and key head j // (HV // H)
    beta            [B, T, HV] write strength; the state is bounded for 0 <= beta <= 2 and unit keys
    g               None, [B, T, HV] or [B, T, HV, K]: natural logarithm of the decay, <= 0 (-inf erases)
    scale           default K ** -0.5
    initial_state   [N, HV, K, V], default zero; N is the number of sequences
    cu_seqlens      int32 [N + 1], for sequences packed along T with B = 1: sequence n is [cu_seqlens[n], cu_seqlens[n
                    + 1]), and may be empty. Without it N = B.
    normalize_qk    scale q and k to unit length over K first: x · rsqrt(Σ x² + 1e-6)

    Returns o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in fp32 (fp64 for fp64 inputs) where
    output_final_state, else None. Gradients flow to q, k, v, beta, g and initial_state, also from the final state.
    Raises ValueError, naming the argument, for a wrong shape, dtype or device.
    """
    _validate(q, k, v, beta, g, initial_state, cu_seqlens)
    form = choose(FORMS, request(q, v, g, cu_seqlens))
    return form.load()(
        q,
        k,
        v,
        beta,
        g,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        normalize_qk=normalize_qk,
    )


def request(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Request:
    """What a call asks of the forms, for `kernels.dispatch.choose` and `explain`."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    gate = "none" if g is None else ("head" if g.dim() == 3 else "channel")
    shape = {"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V, "N": N}
    return Request("delta_rule", q.device, q.dtype, shape, {"gate": gate, "packed": cu_seqlens is not None})


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, H, K] with no empty dim, got {list(q.shape)}")
    B, T, H, K = q.shape
    _expect("k", k, (B, T, H, K), "q's shape")
    if v.dim() != 4 or v.shape[:2] != (B, T) or 0 in v.shape:
        raise ValueError(f"v must be [B, T, HV, V] with B = {B}, T = {T} as in q, got {list(v.shape)}")
    HV, V = v.shape[2:]
    if HV % H:
        raise ValueError(
            f"v has {HV} heads, which is not a multiple of q's {H}; use HV = H · (value heads per key head)"
        )
    _expect("beta", beta, (B, T, HV), "[B, T, HV]")
    if g is not None:
        if g.dim() == 4:
            _expect("g", g, (B, T, HV, K), "[B, T, HV, K]")
        else:
            _expect("g", g, (B, T, HV), "[B, T, HV] or [B, T, HV, K]")
    N = B
    if cu_seqlens is not None:
        N = check_cu_seqlens(cu_seqlens, B, T, q.device)
    if initial_state is not None:
        _expect("initial_state", initial_state, (N, HV, K, V), "[N, HV, K, V]")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {q.dtype}; cast q, k and v to one dtype")
    for name, other in (("beta", beta), ("g", g), ("initial_state", initial_state)):
        if other is not None and other.dtype not in DTYPES:
            raise ValueError(f"{name} must be a floating point tensor, got {other.dtype}")
    for name, other in (("k", k), ("v", v), ("beta", beta), ("g", g), ("initial_state", initial_state)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device} but q is on {q.device}")


def _expect(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)} ({meaning}), got {list(x.shape)}")
