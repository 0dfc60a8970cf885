"""The selective state-space scan of Mamba (arXiv:2312.00752, section 3.2 and algorithm 2).

Per channel d with N states:

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]
    y_t[d]    = sum_n C_t[n] h_t[d, n] + D[d] x_t[d]

Mamba-2, whose A is one number a head, is `gated_linear_attention` with `members.ssd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose
from kernels.packing import check_cu_seqlens
from kernels.state_space.decode import selective_scan_step

__all__ = ["FORMS", "selective_scan", "selective_scan_step"]

FORMS = (
    Form("chunked", "kernels.state_space.chunked", "selective_scan_chunked"),
    Form("reference", "kernels.state_space.reference", "selective_scan_reference"),
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan over a sequence (letters as in the Mamba paper: batch b, time T, channels D, states N).

    x [b, T, D]; dt [b, T, D] step sizes >= 0 (softplus already applied); A [D, N] <= 0; B, C [b, T, N]; D [D] or None.
    initial_state [S, D, N], default zero; S = b, or the number of packed sequences.
    cu_seqlens int32 [S+1]: packed sequences in one row (b = 1); empty sequences are allowed.

    Returns y [b, T, D] in x's dtype, and the final state [S, D, N] in fp32 (fp64 for fp64 x) if output_final_state,
    else None. Gradients flow to every tensor argument, also from the final state.
    Raises ValueError naming the argument that does not fit.
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be [b, T, D] with no empty dim, got {tuple(x.shape)}")
    batch, T, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A must be [D, N] with D={channels}, got {tuple(A.shape)}")
    N = A.shape[1]
    sequences = batch if cu_seqlens is None else check_cu_seqlens(cu_seqlens, batch, T, x.device)
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dt", dt, (batch, T, channels)),
        ("A", A, (channels, N)),
        ("B", B, (batch, T, N)),
        ("C", C, (batch, T, N)),
        ("D", D, (channels,)),
        ("initial_state", initial_state, (sequences, channels, N)),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}: move it there")
    shape_letters = {"B": batch, "T": T, "D": channels, "N": N, "sequences": sequences}
    form = choose(
        FORMS, Request("selective_scan", x.device, x.dtype, shape_letters, {"packed": cu_seqlens is not None})
    )
    with torch.autocast(x.device.type, enabled=False):
        return form.load()(
            x,
            dt,
            A,
            B,
            C,
            D,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
