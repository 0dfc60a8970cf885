"""The short convolution in plain torch, fast on CPU, with a hand-written backward.

All sequences are convolved as one stream of tokens, which lets taps cross from one sequence into the next; then the
first W-1 tokens of every sequence (its head, the only ones that can be wrong) are computed again from `initial_state`
or zeros and written over. So packed, dense and continued batches are one code path, without a loop over sequences.

The stream is handed to conv2d as [1, D, 1, L] in channels-last order: the depthwise kernel then reads [L, D] rows as
they lie (one pass over memory, against W passes for shifted multiply-adds and two transposes for conv1d).
Backward recomputes the pre-activation from x: one cheap pass instead of an activation held for the whole step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WEIGHT_GRADIENT_ROWS = 64  # tokens a block: the accumulator [64, W, D] stays in the L2 cache


def _convolve(stream: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Full convolution of [L, D] with W-1 zeros on both sides: [L + W - 1, D]. Row t uses rows t-W+1 .. t."""
    L, D = stream.shape
    W = weight.shape[1]
    if stream.dtype == torch.float64:  # conv2d has no depthwise kernel in double precision on CPU
        padded = F.pad(stream, (0, 0, W - 1, W - 1))
        out = padded[: L + W - 1] * weight[:, 0]
        for i in range(1, W):
            out += padded[i : i + L + W - 1] * weight[:, i]
        return out if bias is None else out + bias
    image = stream.view(1, 1, L, D).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, None, None], bias, padding=(0, W - 1), groups=D)
    return out.permute(0, 2, 3, 1).reshape(L + W - 1, D)


class _Heads:
    """Where the first W-1 tokens of each sequence lie in the stream, and what they see."""

    def __init__(self, cu_seqlens: Tensor | None, N: int, L: int, W: int, device: torch.device) -> None:
        if cu_seqlens is None:
            bounds = torch.arange(N + 1, device=device) * (L // max(N, 1))
        else:
            bounds = cu_seqlens.long()
        offset = torch.arange(W - 1, device=device)
        self.length = (bounds[1:] - bounds[:-1])[:, None]  # [N, 1]
        self.start = bounds[:-1, None]
        self.valid = offset < self.length  # [N, W-1]
        self.index = torch.where(self.valid, self.start + offset, L)  # row L: a spare row past the stream
        # Final state, oldest first: entry j lies `tail` places after the oldest entry of (initial state, sequence).
        tail = self.length + offset
        self.from_state = tail < W - 1
        self.state_slot = torch.where(self.from_state, tail, 0)
        self.token = torch.where(self.from_state, 0, self.start + tail - (W - 1))

    def gather(self, stream: Tensor) -> Tensor:
        """Head rows [N, W-1, D] of a stream [>= L, D]; zeros where the sequence is shorter."""
        index = torch.where(self.valid, self.index, 0)
        return stream[index] * self.valid[..., None]


def _window(x: Tensor, initial_state: Tensor | None, heads: _Heads) -> Tensor:
    """What the heads see, in fp32 at least: [N, 2(W-1), D], the state and then the head tokens."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    head = heads.gather(x).to(dtype)
    past = torch.zeros_like(head) if initial_state is None else initial_state.to(x.dtype).to(dtype).transpose(1, 2)
    return torch.cat([past, head], dim=1)


def _pre_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, heads: _Heads | None
) -> Tensor:
    """z [L, D] before the activation."""
    L, W = x.shape[0], weight.shape[1]
    z = _convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if heads is not None and window is not None:
        taps = weight.to(window.dtype)
        head = window[:, : W - 1] * taps[:, 0]
        for i in range(1, W):
            head = head + window[:, i : i + W - 1] * taps[:, i]
        if bias is not None:
            head = head + bias.to(window.dtype)
        z.index_copy_(0, heads.index.flatten(), head.to(z.dtype).flatten(0, 1))
    return z[:L]


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, D = x.shape
        W, L = weight.shape[1], B * T
        N = B if cu_seqlens is None else cu_seqlens.numel() - 1
        stream = x.reshape(L, D).contiguous()
        heads = _Heads(cu_seqlens, N, L, W, x.device) if W > 1 else None
        window = None if heads is None else _window(stream, initial_state, heads)
        z = _pre_activation(stream, weight, bias, window, heads)
        y = F.silu(z, inplace=True) if silu else z
        state = None
        if output_final_state:
            state = x.new_zeros(N, D, W - 1)
            if heads is not None:
                entries = stream[heads.token]  # [N, W-1, D]
                if initial_state is not None:
                    past = initial_state.to(x.dtype).transpose(1, 2)
                    slots = heads.state_slot[..., None].expand(-1, -1, D)
                    entries = torch.where(heads.from_state[..., None], past.gather(1, slots), entries)
                else:
                    entries = entries * ~heads.from_state[..., None]
                state = entries.transpose(1, 2).contiguous()
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.heads, ctx.silu = heads, silu
        return y.view(B, T, D), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        heads: _Heads | None = ctx.heads
        B, T, D = x.shape
        W, L = weight.shape[1], B * T
        stream = x.reshape(L, D).contiguous()
        accumulate = torch.promote_types(x.dtype, torch.float32)
        window = None if heads is None else _window(stream, initial_state, heads)

        dz = torch.zeros_like(stream) if dy is None else dy.reshape(L, D).to(x.dtype)
        if ctx.silu:
            z = _pre_activation(stream, weight, bias, window, heads)
            dz = torch.ops.aten.silu_backward.grad_input(dz.contiguous(), z, grad_input=z)
        dbias = None if bias is None else dz.sum(0, dtype=accumulate).to(bias.dtype)

        dweight = torch.zeros(W, D, dtype=accumulate, device=x.device)
        dpast = None
        if heads is not None and window is not None:
            dhead = heads.gather(dz).to(accumulate)  # [N, W-1, D]
            # The heads' gradient goes through their own window; taken out of the stream, none crosses a sequence start.
            dz = dz.clone() if not ctx.silu else dz
            rows = torch.where(heads.valid, heads.index, 0).flatten()  # row 0 is always some sequence's head
            dz.index_fill_(0, rows, 0)
            dwindow = torch.zeros_like(window)
            taps = weight.to(accumulate)
            for i in range(W):
                dwindow[:, i : i + W - 1] += dhead * taps[:, i]
                dweight[i] = (dhead * window[:, i : i + W - 1]).sum((0, 1))
            dpast = dwindow[:, : W - 1]

        dx = _convolve(dz.contiguous(), weight.to(x.dtype).flip(1), None)[W - 1 :]
        _accumulate_weight_gradient(dweight, stream, dz)
        if heads is not None:
            dhead_tokens = dwindow[:, W - 1 :] * heads.valid[..., None]
            dx.index_add_(0, rows, dhead_tokens.flatten(0, 1).to(dx.dtype))
            if dstate is not None:
                entries = dstate.transpose(1, 2)  # [N, W-1, D]
                from_token = entries * ~heads.from_state[..., None]
                dx.index_add_(0, heads.token.flatten(), from_token.flatten(0, 1).to(dx.dtype))
                assert dpast is not None
                slots = heads.state_slot[..., None].expand(-1, -1, D)
                dpast = dpast.scatter_add(1, slots, (entries * heads.from_state[..., None]).to(dpast.dtype))
        dinitial = None
        if initial_state is not None:
            dinitial = (
                torch.zeros_like(initial_state) if dpast is None else dpast.transpose(1, 2).to(initial_state.dtype)
            )
        return dx.view(B, T, D), dweight.t().to(weight.dtype), dbias, dinitial, None, None, None


def _accumulate_weight_gradient(dweight: Tensor, stream: Tensor, dz: Tensor) -> None:
    """dweight[i] += sum_t dz[t] x[t - W + 1 + i], for [W, D]. Rows t < W-1 are heads, whose dz is zero here."""
    L, D = stream.shape
    W = dweight.shape[0]
    rows = WEIGHT_GRADIENT_ROWS
    partial = dweight.new_zeros(rows, W, D)
    for t in range(W - 1, L, rows):
        n = min(rows, L - t)
        seen = stream[t - W + 1 : t + n].to(dweight.dtype)
        taps = seen.as_strided((n, W, D), (D, D, 1))  # row t holds its W taps: a window view, no copy
        partial[:n].addcmul_(taps, dz[t : t + n, None].to(dweight.dtype))
    dweight += partial.sum(0)


def short_convolution_chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.short_conv.short_convolution`. Multiplies in x's dtype, sums weight gradients in fp32 at least."""
    if x.numel() == 0:  # only states can flow, and the definition handles them
        from kernels.short_conv.reference import short_convolution_reference

        return short_convolution_reference(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    silu = activation == "silu"
    return _ShortConvolution.apply(x, weight, bias, initial_state, cu_seqlens, silu, output_final_state)
