"""The delta rule as fused Triton kernels, forward and backward, on NVIDIA and AMD GPUs.

Forward: one kernel for what lies inside a chunk, one for the walk of the state over the chunks, which writes the
output.
Backward: the walk once more, keeping the states; the reverse walk; one kernel for the gradients inside a chunk.
The formulas stand at the kernels. Operands of matrix products have the inputs' dtype; gates, sums, exponentials, the
triangular inverse, accumulators and carried states are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.common.chunks import Chunks, dense_chunks, packed_chunks
from kernels.common.tiles import descriptor, descriptors_pay
from kernels.delta_rule.triton_backward import gradients_kernel
from kernels.delta_rule.triton_launch import chunk_size, launch, precision
from kernels.delta_rule.triton_prepare import prepare_kernel
from kernels.delta_rule.triton_state import scan_backward_kernel, scan_forward_kernel
from kernels.tuning import Use


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
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    g = None if g is None else g.contiguous()
    o, final = _DeltaRule.apply(q, k, v, beta, g, initial_state, scale, output_final_state, cu_seqlens, normalize_qk)
    return o, final if output_final_state else None


@dataclass(frozen=True)
class Shape:
    """What every launch of a call needs to know."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    gate: int  # 0 none, 1 one a head, 2 one a channel
    chunks: Chunks
    scale: float

    descriptors: bool  # tiles are read through tensor descriptors

    @property
    def BK(self) -> int:
        """K filled up to a tile."""
        return triton.next_power_of_2(max(self.K, 16))

    def tile(self, heads: int, *dims: int) -> tuple[int, ...]:
        return (self.chunks.count, heads, *dims)

    @property
    def keys(self) -> dict[str, int]:
        """What a tuning table may ask about."""
        return {"K": self.K, "V": self.V, "gate": self.gate, "T": self.T, "heads": self.chunks.sequences * self.HV}


def _shape(q: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None) -> Shape:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    size = chunk_size(T, K, q.dtype)
    chunks = dense_chunks(B, T, size) if cu_seqlens is None else packed_chunks(cu_seqlens, T, size)
    return Shape(B, T, H, HV, K, V, 0 if g is None else g.dim() - 2, chunks, scale, descriptors_pay(q.device))


@dataclass(frozen=True)
class Prepared:
    """What the scans read: see the kernels' arguments."""

    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    rates: Tensor
    cumulative: Tensor | None
    ends: Tensor | None
    inverse: Tensor
    attention: Tensor
    q_factor: Tensor | None = None
    k_factor: Tensor | None = None


def _prepare(s: Shape, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, normalize: bool) -> Prepared:
    C = s.chunks.size
    inverse, attention = (q.new_empty(s.tile(s.HV, C, C)) for _ in range(2))
    rates = q.new_empty(s.tile(s.HV, C), dtype=torch.float32)
    cumulative = torch.empty_like(rates) if s.gate == 1 else None
    q_in, k_in = (q.new_empty(s.tile(s.H, C, s.BK)) for _ in range(2))
    q_factor = q.new_empty(s.tile(s.H, C), dtype=torch.float32) if normalize else None
    k_factor = torch.empty_like(q_factor) if q_factor is not None else None
    prepare_kernel[(s.HV, s.chunks.count)](
        q,
        k,
        beta,
        g,
        q_in,
        k_in,
        q_factor,
        k_factor,
        rates,
        cumulative,
        inverse,
        attention,
        s.chunks.cu_seqlens,
        s.chunks.indices,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        BT=C,
        BK=s.BK,
        GATED=s.gate == 1,
        NORMALIZE=normalize,
        PACKED=s.chunks.packed,
        PRECISION=precision(q, "inverse"),
        **launch("delta_rule_prepare", q, **s.keys),
    )
    return Prepared(q_in, k_in, k_in, rates, cumulative, None, inverse, attention, q_factor, k_factor)


def _v_block(s: Shape, use: Use) -> tuple[int, bool]:
    """Values a program holds, and whether it may read tiles through descriptors: they cannot mask a part of a head."""
    block = min(use.pop("BV"), triton.next_power_of_2(max(s.V, 16)))
    return block, s.descriptors and s.V % block == 0


def _scan_forward(
    s: Shape, p: Prepared, v: Tensor, initial: Tensor | None, *, output: bool, keep: bool, final: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(o, final state, chunk states, V_new), those asked for."""
    C = s.chunks.size
    o = torch.empty_like(v) if output else None
    states = v.new_empty(s.tile(s.HV, s.V, s.BK)) if keep else None
    v_new = v.new_empty(s.tile(s.HV, s.V, C)) if keep else None
    end = v.new_empty(s.chunks.sequences, s.HV, s.K, s.V, dtype=torch.float32) if final else None
    use = launch("delta_rule_scan_forward", v, **s.keys)
    BV, through = _v_block(s, use)
    scan_forward_kernel[(triton.cdiv(s.V, BV) * s.HV * s.chunks.sequences,)](
        descriptor(p.q_in, s.BK, (C, s.BK), through),
        descriptor(p.k_in, s.BK, (C, s.BK), through),
        descriptor(p.k_out, s.BK, (C, s.BK), through),
        descriptor(v, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        p.ends,
        descriptor(p.inverse, C, (C, C), through),
        descriptor(p.attention, C, (C, C), through),
        o,
        states,
        v_new,
        initial,
        end,
        s.chunks.cu_seqlens,
        s.chunks.offsets,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BV=BV,
        GATE=s.gate,
        OUTPUT=output,
        KEEP=keep,
        INITIAL=initial is not None,
        FINAL=final,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(v, "state"),
        **use,
    )
    return o, end, states, v_new


def _scan_backward(
    s: Shape, p: Prepared, do: Tensor, d_final: Tensor | None, *, initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradients of the chunks' end states, of the triangular systems' right-hand sides, of the initial state)."""
    C = s.chunks.size
    d_states = do.new_empty(s.tile(s.HV, s.V, s.BK))
    d_error = do.new_empty(s.tile(s.HV, s.V, C))
    d_initial = do.new_empty(s.chunks.sequences, s.HV, s.K, s.V, dtype=torch.float32) if initial else None
    use = launch("delta_rule_scan_backward", do, **s.keys)
    BV, through = _v_block(s, use)
    scan_backward_kernel[(triton.cdiv(s.V, BV) * s.HV * s.chunks.sequences,)](
        descriptor(p.q_in, s.BK, (C, s.BK), through),
        descriptor(p.k_in, s.BK, (C, s.BK), through),
        descriptor(p.k_out, s.BK, (C, s.BK), through),
        descriptor(do, s.HV * s.V, (C, BV), through),
        p.rates,
        p.cumulative,
        p.ends,
        descriptor(p.inverse, C, (C, C), through),
        descriptor(p.attention, C, (C, C), through),
        d_states,
        d_error,
        d_final,
        d_initial,
        s.chunks.cu_seqlens,
        s.chunks.offsets,
        s.scale,
        s.T,
        H=s.H,
        HV=s.HV,
        K=s.K,
        V=s.V,
        BT=C,
        BK=s.BK,
        BV=BV,
        GATE=s.gate,
        INITIAL=initial,
        FINAL=d_final is not None,
        PACKED=s.chunks.packed,
        DESCRIPTOR=through,
        PRECISION=precision(do, "state"),
        **use,
    )
    return d_states, d_error, d_initial


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, scale, output_final_state, cu_seqlens, normalize_qk):
        s = _shape(q, v, g, scale, cu_seqlens)
        p = _prepare(s, q, k, beta, g, normalize_qk)
        initial = None if initial_state is None else initial_state.contiguous()
        o, final, _, _ = _scan_forward(s, p, v, initial, output=True, keep=False, final=output_final_state)
        ctx.shape, ctx.normalize, ctx.dtypes = s, normalize_qk, (beta.dtype, None if g is None else g.dtype)
        ctx.save_for_backward(
            v, initial, p.q_in, p.k_in, p.rates, p.cumulative, p.inverse, p.attention, p.q_factor, p.k_factor
        )
        return o, final

    @staticmethod
    def backward(ctx, do, d_final):
        v, initial, q_in, k_in, rates, cumulative, inverse, attention, q_factor, k_factor = ctx.saved_tensors
        s: Shape = ctx.shape
        p = Prepared(q_in, k_in, k_in, rates, cumulative, None, inverse, attention, q_factor, k_factor)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        _, _, states, v_new = _scan_forward(s, p, v, initial, output=False, keep=True, final=False)
        d_states, d_error, d_initial = _scan_backward(s, p, do, d_final, initial=ctx.needs_input_grad[5])
        # Gradients of shared key heads are summed over their value heads afterwards, hence fp32 until then.
        kind = torch.float32 if s.HV > s.H else v.dtype
        dq, dk = (v.new_empty(s.B, s.T, s.HV, s.K, dtype=kind) for _ in range(2))
        dv = torch.empty_like(v)
        dbeta = v.new_empty(s.B, s.T, s.HV, dtype=ctx.dtypes[0])
        dg = v.new_empty(s.B, s.T, s.HV, dtype=ctx.dtypes[1]) if s.gate == 1 else None
        C = s.chunks.size
        use = launch("delta_rule_gradients", v, **s.keys)
        BV, through = _v_block(s, use)
        gradients_kernel[(s.HV, s.chunks.count)](
            descriptor(q_in, s.BK, (C, s.BK), through),
            descriptor(k_in, s.BK, (C, s.BK), through),
            descriptor(v, s.HV * s.V, (C, BV), through),
            descriptor(do, s.HV * s.V, (C, BV), through),
            rates,
            cumulative,
            descriptor(states, s.BK, (BV, s.BK), through),
            descriptor(d_states, s.BK, (BV, s.BK), through),
            descriptor(v_new, C, (BV, C), through),
            descriptor(d_error, C, (BV, C), through),
            q_factor,
            k_factor,
            dq,
            dk,
            dv,
            dbeta,
            dg,
            s.chunks.cu_seqlens,
            s.chunks.indices,
            s.scale,
            s.T,
            H=s.H,
            HV=s.HV,
            K=s.K,
            V=s.V,
            BT=C,
            BK=s.BK,
            BV=BV,
            GATED=s.gate == 1,
            NORMALIZE=ctx.normalize,
            PACKED=s.chunks.packed,
            DESCRIPTOR=through,
            PRECISION=precision(v, "fast"),
            **use,
        )
        if s.HV > s.H:
            dq, dk = (x.view(s.B, s.T, s.H, s.HV // s.H, s.K).sum(3).to(v.dtype) for x in (dq, dk))
        return dq, dk, dv, dbeta, dg, d_initial, None, None, None, None
