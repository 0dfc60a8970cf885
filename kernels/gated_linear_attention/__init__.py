"""Linear attention with a decaying state: one operator for linear attention, RetNet, Mamba-2 (SSD), GLA and HGRN2.

Per head, with a state S [K, V]:

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_tᵀ          o_t = scale · S_tᵀ q_t

| g               | family                                                                               |
|-----------------|--------------------------------------------------------------------------------------|
| None            | linear attention (arXiv:2006.16236)                                                  |
| [B, T, HV]      | RetNet (arXiv:2307.08621), Mamba-2 (arXiv:2405.21060)                                |
| [B, T, HV, K]   | GLA (arXiv:2312.06635), HGRN2 (arXiv:2404.07904)                                     |

`members.py` gives each family's q, k, v, g; `context.py` joins spans of a sequence that were computed apart.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.gated_linear_attention.decode import gated_linear_attention_step
from kernels.packing import check_cu_seqlens

__all__ = ["FORMS", "gated_linear_attention", "gated_linear_attention_step", "request"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    if objection is None and importlib.util.find_spec("kernels.gated_linear_attention.triton") is None:
        return "kernels/gated_linear_attention/triton.py does not exist"
    return objection


FORMS = (
    Form("triton", "kernels.gated_linear_attention.triton", "gated_linear_attention_triton", _triton_why_not),
    Form("chunked", "kernels.gated_linear_attention.chunked", "gated_linear_attention_chunked"),
    Form("reference", "kernels.gated_linear_attention.reference", "gated_linear_attention_reference"),
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over a sequence.

    q, k [B, T, H, K]; v [B, T, HV, V], HV a multiple of H: value head j reads query and key head j // (HV // H).
    g: natural log of the decay, <= 0: None (no decay), [B, T, HV] (one a head) or [B, T, HV, K] (one a key channel).
    scale: default K ** -0.5. initial_state [N, HV, K, V], default zero; N = B, or the number of packed sequences.
    cu_seqlens int32 [N+1]: packed sequences in one row (B = 1); empty sequences are allowed.

    Returns o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in fp32 (fp64 for fp64 inputs) if
    output_final_state, else None. Gradients flow to every tensor argument, also from the final state.
    Raises ValueError naming the argument that does not fit.
    """
    _validate(q, k, v, g, initial_state, cu_seqlens)
    form = choose(FORMS, request(q, v, g, cu_seqlens))
    with torch.autocast(q.device.type, enabled=False):
        return form.load()(
            q,
            k,
            v,
            g,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )


def request(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Request:
    """What a call asks of the forms, for `kernels.dispatch.choose` and `explain`."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    gate = "none" if g is None else ("head" if g.dim() == 3 else "channel")
    shape = {"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V, "N": N}
    return Request("gated_linear_attention", q.device, q.dtype, shape, {"gate": gate, "packed": cu_seqlens is not None})


def _validate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, H, K] with no empty dim, got {tuple(q.shape)}")
    B, T, H, K = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 4 or v.shape[:2] != (B, T) or 0 in v.shape:
        raise ValueError(f"v must be [B, T, HV, V] with B={B} and T={T} as in q, got {tuple(v.shape)}")
    HV, V = v.shape[2:]
    if HV % H:
        raise ValueError(
            f"v has {HV} heads, which is not a multiple of q's {H}: use HV = H · (value heads per key head)"
        )
    if g is not None and g.shape not in ((B, T, HV), (B, T, HV, K)):
        raise ValueError(
            f"g must be {(B, T, HV)} or {(B, T, HV, K)} (log decay a head or a channel), got {tuple(g.shape)}"
        )
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, q.device)
    if initial_state is not None and initial_state.shape != (N, HV, K, V):
        raise ValueError(f"initial_state must be [N, HV, K, V] = {(N, HV, K, V)}, got {tuple(initial_state.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {q.dtype}: cast q, k and v to one dtype")
    for name, other in (("k", k), ("v", v), ("g", g), ("initial_state", initial_state)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}, q is on {q.device}: move it there")
        if other is not None and not other.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {other.dtype}")
