"""The activations inside Triton kernels: value and slope at once, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(z, KIND: tl.constexpr):
    """(act(z), act'(z)); KIND as in kernels.experts.activations. What is not used generates no code."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        value = z * s
        slope = s + value * (1.0 - s)
    elif KIND == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * below
        slope = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh":  # 1/2 (1 + tanh(t)) = sigmoid(2 t), and infinities do no harm
        s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        value = z * s
        slope = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif KIND == "relu":
        value = tl.maximum(z, 0.0)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "relu2", "unknown activation")
        value = tl.maximum(z, 0.0)
        slope = 2.0 * value
        value = value * value
    return value, slope
