"""The delta rule as fused Triton kernels, forward and backward, on NVIDIA and AMD GPUs.

Forward: one kernel for what lies inside a chunk, one for the walk of the state over the chunks, which writes the
output.
Backward: the walk once more, keeping the states; the reverse walk; one kernel for the gradients inside a chunk.
The formulas stand at the kernels. Operands of matrix products have the inputs' dtype; gates, sums, exponentials, the
triangular inverse, accumulators and carried states are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.common.tiles import aligned
from kernels.delta_rule.triton_call import Prepared, channel_gate, prepare
from kernels.delta_rule.triton_gradients import Walked, channel_gradients, gradients
from kernels.delta_rule.triton_scans import scan_backward, scan_forward
from kernels.delta_rule.triton_segments import join
from kernels.delta_rule.triton_shape import Shape, shape_of


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The meaning of `kernels.delta_rule.delta_rule`; same arguments, already validated. K <= 256."""
    q, k, v, beta = (aligned(x) for x in (q, k, v, beta))
    g = None if g is None else g.contiguous()
    o, final = _DeltaRule.apply(q, k, v, beta, g, initial_state, scale, output_final_state, cu_seqlens, normalize_qk)
    return o, final if output_final_state else None


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, scale, output_final_state, cu_seqlens, normalize_qk):
        s = shape_of(q, v, g, scale, cu_seqlens)
        p = prepare(s, q, k, beta, g, normalize_qk)
        initial = None if initial_state is None else initial_state.contiguous()
        transition = None
        if s.segments is None:
            walk = scan_forward(s, p, v, initial, output=True, final=output_final_state)
            o, final = walk.o, walk.final
        else:
            summary = scan_forward(s, p, v, None, summary=True)
            transition = summary.transition
            assert summary.final is not None and transition is not None
            initial, final = join(
                s.segments, initial, summary.final, transition, final=output_final_state, reverse=False
            )
            o = scan_forward(s, p, v, initial, output=True).o
        ctx.shape, ctx.normalize, ctx.dtypes = s, normalize_qk, (beta.dtype, None if g is None else g.dtype)
        if s.gate == 2:  # the decayed copies are six times as large as q and k, and cheap to make again
            ctx.save_for_backward(v, initial, transition, p.inverse, p.attention, q, k, beta, g)
        else:
            small = (p.rates, p.cumulative, p.q_factor, p.k_factor)
            ctx.save_for_backward(v, initial, transition, p.inverse, p.attention, p.q_in, p.k_in, *small)
        return o, final

    @staticmethod
    def backward(ctx, do, d_final):
        s: Shape = ctx.shape
        v, initial, transition, inverse, attention, *rest = ctx.saved_tensors
        if s.gate == 2:
            q, k, beta, g = rest
            p = channel_gate(s, q, k, beta, g, ctx.normalize, (inverse, attention))
        else:
            q_in, k_in, rates, cumulative, *factors = rest
            p = Prepared(q_in, k_in, k_in, rates, cumulative, None, inverse, attention, q_in, k_in, *factors)
        do = torch.zeros_like(v) if do is None else aligned(do)
        d_final = None if d_final is None else d_final.contiguous()
        forward = scan_forward(s, p, v, initial, keep=True)
        wanted = ctx.needs_input_grad[5]
        if s.segments is None:
            reverse = scan_backward(s, p, do, d_final, keep=True, initial=wanted)
            d_initial = reverse.d_initial
        else:
            parts = scan_backward(s, p, do, None, initial=True).d_initial
            assert parts is not None
            d_final, d_initial = join(s.segments, d_final, parts, transition, final=wanted, reverse=True)
            reverse = scan_backward(s, p, do, d_final, keep=True)
        assert forward.states is not None and forward.v_new is not None
        assert reverse.d_states is not None and reverse.d_error is not None
        walked = Walked(forward.states, forward.v_new, reverse.d_states, reverse.d_error)
        if s.gate == 2:
            dq, dk, dv, dbeta, dg = channel_gradients(s, p, walked, v, do, ctx.dtypes)
            dq, dk = (_through_normalization(x, y, ctx.normalize) for x, y in ((dq, q), (dk, k)))
        else:
            dq, dk, dv, dbeta, dg = gradients(s, p, walked, v, do, ctx.dtypes)
        return dq, dk, dv, dbeta, dg, d_initial, None, None, None, None


def _through_normalization(dy: Tensor, x: Tensor, normalized: bool) -> Tensor:
    """Gradient of x [B, T, H, K] from that of its rows at unit length, if they were brought there."""
    if not normalized:
        return dy.to(x.dtype)
    wide = x.float()
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    unit = wide * factor
    return (factor * (dy - unit * (unit * dy).sum(-1, keepdim=True))).to(x.dtype)
