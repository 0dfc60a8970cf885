"""SwiGLU between the two projections of a feed-forward layer: silu(gate) * up, read from one fused projection.

Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, eager_objection, triton_objection

__all__ = ["FORMS", "swiglu"]

FORMS = (
    Form("triton", "kernels.swiglu.triton", "swiglu_triton", triton_objection),
    Form("chunked", "kernels.swiglu.chunked", "swiglu_chunked", eager_objection),
    Form("reference", "kernels.swiglu.reference", "swiglu_reference"),
)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(z) = z / (1 + exp(-z)).

    gate_up [..., 2H]: the gate's channels first, then up's; any strides over the rows. Returns [..., H] in its dtype.
    Only gate_up is kept for the backward, which computes the activation again.
    Raises ValueError for a last dim that has no two halves, and for integers.
    """
    width = gate_up.shape[-1] if gate_up.dim() else 0
    if width == 0 or width % 2 or not gate_up.is_floating_point():
        raise ValueError(
            f"gate_up must be floating point [..., 2H], gate first and then up, got {gate_up.dtype} {tuple(gate_up.shape)}"
        )
    shape = {"rows": gate_up.numel() // width, "H": width // 2}
    form = choose(FORMS, Request("swiglu", gate_up.device, gate_up.dtype, shape))
    with torch.autocast(gate_up.device.type, enabled=False):
        y: Tensor = form.load()(gate_up)
    return y
