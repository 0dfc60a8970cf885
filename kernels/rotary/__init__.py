"""Rotary position embedding: pairs of channels turned by angles that grow with the position.

Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2. Pairs are channels i and i + R/2 (half-split: GPT-NeoX, Llama in
transformers' layout) or 2i and 2i + 1 (interleaved: the paper, GPT-J, Llama's own release).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import Form, Request, choose, eager_objection, triton_objection

__all__ = ["FORMS", "rotary"]

FORMS = (
    Form("triton", "kernels.rotary.triton", "rotary_triton", triton_objection),
    Form("chunked", "kernels.rotary.chunked", "rotary_chunked", eager_objection),
    Form("reference", "kernels.rotary.reference", "rotary_reference"),
)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Turns the first R channels of each head; the others pass unchanged (partial rotation).

        (a, b) -> (a cos - b sin, b cos + a sin)        for each pair (a, b) of channels

    x: [B, T, H, K], any strides; a slice of a projection is read where it lies.
    cos, sin: of the angles, fp32 or wider, R = twice their last dim, R <= K. Either a row for each token,
        [B or 1, T, 1, R / 2], or with `positions` a table [S, R / 2] from which each token takes the row of its position.
    positions: int64 [B or 1, T], each token's position in its own sequence (packed sequences begin again at 0).
    interleaved: which channels form a pair: False for i and i + R/2, True for 2i and 2i + 1.

    Returns x's shape and dtype; the rotation is in fp32 at least. Only cos and sin are kept for the backward, and they get no
    gradient. Raises ValueError naming the argument that does not fit.
    """
    _check(x, cos, sin, positions)
    B, T, H, K = x.shape
    request = Request(
        "rotary",
        x.device,
        x.dtype,
        {"B": B, "T": T, "H": H, "K": K, "R": 2 * cos.shape[-1]},
        {"interleaved": interleaved, "positions": positions is not None},
    )
    form = choose(FORMS, request).load()
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = form(x, cos.detach(), sin.detach(), positions, interleaved)
    return y


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, T, H, K], got {x.dtype} {tuple(x.shape)}")
    B, T, _, K = x.shape
    if positions is None:
        fits = cos.dim() == 4 and cos.shape[0] in (1, B) and cos.shape[1] == T and cos.shape[2] == 1
        wanted = f"[{B} or 1, {T}, 1, R / 2], a row for each token of x"
    else:
        fits = cos.dim() == 2
        wanted = "[S, R / 2], a table, where positions are given"
    if not fits or cos.shape[-1] < 1:
        raise ValueError(f"cos must be {wanted}, got {tuple(cos.shape)}")
    if 2 * cos.shape[-1] > K:
        raise ValueError(f"cos has {cos.shape[-1]} angles for {2 * cos.shape[-1]} channels, but x has only K = {K}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin must be {cos.dtype} {tuple(cos.shape)} as cos, got {sin.dtype} {tuple(sin.shape)}: "
            "both come from the same angles"
        )
    if cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"cos and sin must be float32 or float64, got {cos.dtype}: rounded angles lose positions")
    if positions is None:
        return
    if positions.dtype != torch.int64 or positions.dim() != 2 or positions.shape not in ((B, T), (1, T)):
        raise ValueError(f"positions must be int64 [{B} or 1, {T}], got {positions.dtype} {tuple(positions.shape)}")
    # The values are read on the CPU only: reading them on a GPU would stall it.
    if positions.device.type == "cpu" and positions.numel():
        low, high = (int(i) for i in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions reach {low if low < 0 else high}, but cos has rows 0..{cos.shape[0] - 1}")
