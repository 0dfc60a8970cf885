"""Launches of the gated linear attention kernels: grids, buffers and launch parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.architecture import architecture, dot_precision, facts
from kernels.common.chunks import Chunks
from kernels.common.tiles import dies
from kernels.gated_linear_attention.triton_backward import backward_kernel, score_gradient_kernel
from kernels.gated_linear_attention.triton_backward_channel import channel_backward_kernel
from kernels.gated_linear_attention.triton_gates import cumulative_gate_kernel, prepare_kernel
from kernels.gated_linear_attention.triton_output import output_kernel
from kernels.gated_linear_attention.triton_parameters import DEFAULTS
from kernels.gated_linear_attention.triton_scan import fold_kernel, scan_kernel
from kernels.tuning import parameters

SHORTEST_SEGMENT = 8  # chunks


@dataclass(frozen=True)
class Prepared:
    """A channel gate's operands: qg, kg [B, T, HV, K], decay [slots, HV, K] fp32, scores [B, T, HV, BT] or None."""

    qg: Tensor
    kg: Tensor
    decay: Tensor
    scores: Tensor | None


class Launcher:
    """The kernels of one call. q, k [B, T, H, K], v [B, T, HV, V] contiguous; `gate` tells none, scalar and channel apart."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, scale: float, chunks: Chunks) -> None:
        self.q, self.k, self.v, self.scale, self.chunks = q, k, v, scale, chunks
        self.gate = 0 if gate is None else gate.dim() - 2  # 0 none, 1 scalar, 2 channel
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.arch = architecture(q.device)
        self.dies = dies(q.device)
        self.fast = dot_precision(self.arch, "fast")
        # Half precision states save half of the traffic; fp16 has too little range for them.
        self.state_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32

    def use(self, kernel: str) -> dict[str, int]:
        """Launch parameters; tiles no wider than the head."""
        use = parameters(
            kernel,
            self.arch,
            defaults=DEFAULTS,
            K=self.K,
            V=self.V,
            T=self.T,
            heads=self.chunks.sequences * self.HV,
            gate=self.gate,
            bytes=self.q.element_size(),
        )
        for name, width in (("BK", self.K), ("BV", self.V)):
            if name in use:
                use[name] = min(use[name], max(16, triton.next_power_of_2(width)))
        if self.q.element_size() == 4:  # fp32 operands take twice the registers, and tf32x3 three times
            most = 16 if kernel == "gla_score_gradient" else 32
            use.update({name: min(use[name], most) for name in ("BK", "BV") if name in use})
        return use

    @property
    def batch(self) -> dict[str, object]:
        """Arguments that tell a chunk-parallel kernel where its chunk lies."""
        chunks = self.chunks
        return {"cu_seqlens": chunks.cu_seqlens, "indices": chunks.indices, "T": chunks.tokens, "PACKED": chunks.packed}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def cumulative_gate(self, g: Tensor | None) -> Tensor | None:
        """G in units of log2, fp32, of g's shape."""
        if g is None:
            return None
        G = self.empty(*g.shape, dtype=torch.float32)
        S = g.shape[2:].numel()
        use = self.use("gla_cumulative_gate")
        use["BS"] = min(use["BS"], max(16, triton.next_power_of_2(S)))
        if G.numel():
            grid = (self.chunks.count * triton.cdiv(S, use["BS"]),)
            cumulative_gate_kernel[grid](g, G, S=S, BT=self.chunks.size, **self.batch, **use)
        return G

    def prepare(self, G: Tensor | None, *, scores: bool) -> Prepared | None:
        if self.gate != 2:
            return None
        shape = (self.B, self.T, self.HV)
        qg, kg = (self.empty(*shape, self.K, dtype=self.q.dtype) for _ in range(2))
        decay = self.empty(self.chunks.count, self.HV, self.K, dtype=torch.float32)
        A = self.empty(*shape, self.chunks.size, dtype=self.q.dtype) if scores else None
        if qg.numel():
            prepare_kernel[(self.chunks.count * self.HV,)](
                self.q, self.k, G, qg, kg, decay, A, scale=self.scale, H=self.H, HV=self.HV, K=self.K,
                BT=self.chunks.size, LEVELS=self.chunks.size.bit_length() - 1, SCORES=scores, DIES=self.dies,
                PRECISION=self.fast,
                **self.batch, **self.use("gla_prepare" if scores else "gla_decay"),
            )  # fmt: skip
        return Prepared(qg, kg, decay, A)

    def _scan(
        self, a: Tensor, b: Tensor, gates: Tensor | None, start: Tensor | None, wants_last: bool, *, reverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        chunks = self.chunks
        states = self.empty(chunks.count, self.HV, self.K, self.V, dtype=self.state_dtype)
        heads = chunks.sequences * self.HV
        last = self.empty(chunks.sequences, self.HV, self.K, self.V, dtype=torch.float32) if wants_last else None
        use = self.use("gla_scan")
        tiles = triton.cdiv(self.K, use["BK"]) * triton.cdiv(self.V, use["BV"])
        segments = use.pop("SEGMENTS") or self._segments(heads * tiles)

        def scan(start: Tensor | None, last: Tensor | None, decays: Tensor | None) -> None:
            scan_kernel[(heads * segments * tiles,)](
                a, b, gates, start, states, last, decays, chunks.cu_seqlens, chunks.offsets, self.scale, chunks.tokens,
                segments, HA=a.shape[2], HV=self.HV, K=self.K, V=self.V, BT=chunks.size, GATE=self.gate,
                REVERSE=reverse, HAS_START=start is not None, HAS_LAST=last is not None, SUMMARY=decays is not None,
                PACKED=chunks.packed, DIES=self.dies, PRECISION=dot_precision(self.arch, "state"), **use,
            )  # fmt: skip

        if segments == 1:
            scan(start, last, None)
            return states, last
        entering = self.empty(heads, segments, self.K, self.V, dtype=torch.float32)
        decays = self.empty(heads, segments, self.K, dtype=torch.float32)
        scan(None, entering, decays)
        fold = self.use("gla_fold")
        fold_kernel[(heads * triton.cdiv(self.K * self.V, fold["BLOCK"]),)](
            entering, decays, start, last, segments, REVERSE=reverse, K=self.K, V=self.V,
            HAS_START=start is not None, HAS_LAST=wants_last, **fold,
        )  # fmt: skip
        scan(entering, None, None)
        return states, last

    def _segments(self, programs: int) -> int:
        """Segments a sequence, so that the scan has about two programs for each CU or SM.

        Two passes cost about 1.7 of one, hence never two segments; and a segment should be long enough to hide its
        start.
        """
        wanted = 2 * facts(self.arch).units // programs
        segments = min(wanted, self.chunks.count // max(1, self.chunks.sequences) // SHORTEST_SEGMENT)
        return segments if segments >= 3 else 1

    def states(
        self, G: Tensor | None, prepared: Prepared | None, start: Tensor | None, wants_final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(state at every chunk's start, final state)."""
        if prepared is not None:
            return self._scan(prepared.kg, self.v, prepared.decay, start, wants_final, reverse=False)
        return self._scan(self.k, self.v, G, start, wants_final, reverse=False)

    def state_gradients(
        self, do: Tensor, G: Tensor | None, prepared: Prepared | None, dfinal: Tensor | None, wants_start: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(gradient of the state at every chunk's end, gradient of the initial state)."""
        if prepared is not None:
            return self._scan(prepared.qg, do, prepared.decay, dfinal, wants_start, reverse=True)
        return self._scan(self.q, do, G, dfinal, wants_start, reverse=True)

    def _output(
        self, a: Tensor, other: Tensor, b: Tensor, G: Tensor | None, A: Tensor | None, states: Tensor, *, reverse: bool
    ) -> Tensor:
        out = torch.empty_like(self.v)
        use = self.use("gla_output")
        if out.numel():
            output_kernel[(self.chunks.count * self.HV * triton.cdiv(self.V, use["BV"]),)](
                a, other, b, G, A, states, out, scale=self.scale, HA=a.shape[2], HV=self.HV, K=self.K, V=self.V,
                BT=self.chunks.size, GATE=self.gate, REVERSE=reverse, DIES=self.dies, PRECISION=self.fast,
                **self.batch, **use,
            )  # fmt: skip
        return out

    def outputs(self, G: Tensor | None, prepared: Prepared | None, states: Tensor) -> Tensor:
        if prepared is not None:
            return self._output(prepared.qg, self.k, self.v, None, prepared.scores, states, reverse=False)
        return self._output(self.q, self.k, self.v, G, None, states, reverse=False)

    def gradients(
        self,
        do: Tensor,
        G: Tensor | None,
        prepared: Prepared | None,
        scores: Tensor | None,
        states: Tensor,
        dstates: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk [B, T, H, K], dv [B, T, HV, V], dg of g's shape in fp32 or None."""
        # Grouped value heads: each leaves its part in fp32, summed below.
        part = self.q.dtype if self.HV == self.H else torch.float32
        dq, dk = (self.empty(self.B, self.T, self.HV, self.K, dtype=part) for _ in range(2))
        W = self.empty(self.B, self.T, self.HV, self.chunks.size, dtype=self.q.dtype)
        slots = self.chunks.count * self.HV
        common = {
            "scale": self.scale, "HV": self.HV, "V": self.V, "BT": self.chunks.size, "PRECISION": self.fast,
            **self.batch,
        }  # fmt: skip
        if W.numel():
            score_gradient_kernel[(slots,)](
                self.v, do, G, W, GATE=self.gate, **common, **self.use("gla_score_gradient")
            )
        use = self.use("gla_backward" if prepared is None else "gla_channel_backward")
        blocks = triton.cdiv(self.K, use["BK"])
        operands = (self.q, self.k, self.v, do, G, W, states, dstates, dq, dk)
        dg: Tensor | None
        if prepared is not None:
            dv = self._output(prepared.kg, self.q, do, None, scores, dstates, reverse=True)
            assert G is not None
            dg = torch.empty_like(G)
            if dq.numel():
                channel_backward_kernel[(slots * blocks,)](
                    *operands,
                    dg,
                    H=self.H,
                    K=self.K,
                    LEVELS=self.chunks.size.bit_length() - 1,
                    DIES=self.dies,
                    **common,
                    **use,
                )
        else:
            dv = self._output(self.k, self.q, do, G, None, dstates, reverse=True)
            parts = None if G is None else self.empty(blocks, *G.shape, dtype=torch.float32)
            if dq.numel():
                backward_kernel[(slots * blocks,)](
                    *operands,
                    parts,
                    H=self.H,
                    K=self.K,
                    tokens=self.B * self.T,
                    GATE=self.gate,
                    DIES=self.dies,
                    **common,
                    **use,
                )
            dg = None if parts is None else parts[0] if blocks == 1 else parts.sum(0)
        if self.HV != self.H:
            dq, dk = (x.view(self.B, self.T, self.H, -1, self.K).sum(3).to(self.q.dtype) for x in (dq, dk))
        return dq, dk, dv, dg
