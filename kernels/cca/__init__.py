"""Queries and keys of compressed convolutional attention: two causal convolutions, the query-key mean, and the norms.

With z = [q0; k0] the projections, J = H + HKV heads of d channels, and group(h) the key head that query head h reads:

    u[t] = depthwise_bias + sum_i depthwise[:, i] z[t - W0 + 1 + i]               each channel by itself
    s[t, j] = grouped_bias[j] + sum_i u[t - W1 + 1 + i, j] grouped[j, i d : (i + 1) d]         each head by itself
    q[t, h] = unit(s[t, h] + (q0[t, h] + k0[t, group(h)]) / 2)
    k[t, g] = factor[g] unit(s[t, H + g] + (mean of the group's q0[t, h] + k0[t, g]) / 2)          unit(x) = x / |x|

No tap crosses the start of a sequence. Before it stand the R = W0 + W1 - 2 columns of `initial_state`, or zeros, padded once
for both convolutions: there u is depthwise_bias, not zero.
Source: Figliolia et al. 2025, arXiv:2510.04476, as ZAYA1 has it (arXiv:2511.17127).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cca.decode import cca_step
from kernels.cca.state import last_columns
from kernels.dispatch import Form, Request, choose, triton_objection
from kernels.packing import check_cu_seqlens

__all__ = ["FORMS", "cca", "cca_step"]

WIDEST = 256  # channels of a head in the Triton form, which holds a head of each token in registers


def _triton_why_not(request: Request) -> str | None:
    objection = triton_objection(request)
    if objection is not None:
        return objection
    if request.shape["d"] > WIDEST:
        return f"d = {request.shape['d']}: the Triton form holds heads of at most {WIDEST} channels"
    return None


FORMS = (
    Form("triton", "kernels.cca.triton", "cca_triton", _triton_why_not),
    Form("chunked", "kernels.cca.chunked", "cca_chunked"),
    Form("reference", "kernels.cca.reference", "cca_reference"),
)


def cca(
    z: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    factor: Tensor,
    *,
    eps: float = 1e-12,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries of length 1 and keys of length |factor|, before the rotation.

    z [B, T, C], C = J d: the query heads' channels, then the key heads'; any strides over the rows.
    depthwise [C, W0], the last column weighs the current token; depthwise_bias [C].
    grouped [J, W1 d, d]: a matrix a head, its rows tap by tap, oldest first; grouped_bias [C].
    factor [HKV]: what each key head's keys are multiplied by. eps: added to the sum of squares under the root.
    initial_state [N, R, C]: the columns of z before each sequence, oldest first; N = B, or the packed sequences.
    cu_seqlens int32 [N+1]: packed sequences in one row (B = 1); empty sequences are allowed.

    Returns q [B, T, H, d] and k [B, T, HKV, d] in z's dtype, and the last R columns of each sequence [N, R, C] if
    output_final_state, else None. Products are in z's dtype, everything else in fp32 at least. Only the inputs are kept for
    the backward. Raises ValueError naming the argument that does not fit.
    """
    shape = _check(z, depthwise, depthwise_bias, grouped, grouped_bias, factor)
    B, T = z.shape[:2]
    shape["N"] = N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, z.device)
    reach = depthwise.shape[1] + grouped.shape[1] // grouped.shape[2] - 2
    if initial_state is not None and initial_state.shape != (N, reach, z.shape[2]):
        raise ValueError(
            f"initial_state must be [N, W0 + W1 - 2, C] = {(N, reach, z.shape[2])}, got {tuple(initial_state.shape)}"
        )
    given = {"depthwise": depthwise, "depthwise_bias": depthwise_bias, "grouped": grouped, "grouped_bias": grouped_bias}
    for name, tensor in {**given, "factor": factor, "initial_state": initial_state}.items():
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z is on {z.device}: move it there")
    options = {"packed": cu_seqlens is not None, "initial_state": initial_state is not None}
    form = choose(FORMS, Request("cca", z.device, z.dtype, shape, options)).load()
    with torch.autocast(z.device.type, enabled=False):
        q, k = form(z, *given.values(), factor, eps=eps, initial_state=initial_state, cu_seqlens=cu_seqlens)
        final = last_columns(z, initial_state, reach, cu_seqlens) if output_final_state else None
    return q, k, final


def _check(
    z: Tensor, depthwise: Tensor, depthwise_bias: Tensor, grouped: Tensor, grouped_bias: Tensor, factor: Tensor
) -> dict[str, int]:
    """The sizes, by letter."""
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"z must be floating point [B, T, C], got {z.dtype} {tuple(z.shape)}")
    B, T, C = z.shape
    if depthwise.dim() != 2 or depthwise.shape[0] != C or depthwise.shape[1] < 1:
        raise ValueError(f"depthwise must be [C, W0] with C={C}, got {tuple(depthwise.shape)}")
    if grouped.dim() != 3 or grouped.shape[0] * grouped.shape[2] != C:
        raise ValueError(f"grouped must be [J, W1 d, d] with J d = C = {C}, got {tuple(grouped.shape)}")
    J, rows, d = grouped.shape
    if rows % d or rows == 0:
        raise ValueError(f"grouped has {rows} rows a head, which is not a multiple of its d = {d} channels")
    for name, bias in (("depthwise_bias", depthwise_bias), ("grouped_bias", grouped_bias)):
        if bias.shape != (C,):
            raise ValueError(f"{name} must be [C] with C={C}, got {tuple(bias.shape)}")
    keys = factor.numel()
    if factor.dim() != 1 or not 1 <= keys < J or (J - keys) % keys:
        raise ValueError(
            f"factor must be [HKV], one a key head, and HKV must divide the J - HKV query heads; J = {J}, got factor "
            f"{tuple(factor.shape)}"
        )
    return {"B": B, "T": T, "H": J - keys, "HKV": keys, "d": d, "W0": depthwise.shape[1], "W1": rows // d}
