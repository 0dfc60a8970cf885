"""Newton-Schulz with matrix products only: the direct iteration, and the Gram form on the small side.

    direct   A = X X^T,  X <- a X + (b A + c A^2) X                                            X [m, n], m <= n
    Gram     R = X X^T once;  P = a I + b R + c R^2,  Q <- P Q,  R <- P R P;  at the end X <- Q X

Every P is a polynomial of R, so all these m x m matrices commute and all their products are symmetric: half of each is enough.
The Gram form does much of its work on m x m, which pays where n is larger than m. It squares singular values, though: an error in
R of the size of the rounding may make an eigenvalue negative, and the polynomials blow that up (in bf16 to 1e3 and more). So R is
formed anew from Q X after every two steps: then it is as exact as the direct form (anew once, after two steps, leaves singular
values up to 1.4 in bf16 where the direct form has 1.15).
Sources: K. Jordan 2024 (Muon); the Gram form with restarts: gram-newton-schulz (Dao-AILab).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.newton_schulz.coefficients import Coefficients
from kernels.newton_schulz.reference import SMALLEST

RESTART = 2  # steps after which the Gram form begins anew, each time
# Cut into so many row blocks, of which those above the diagonal are computed. It pays in fp32 on a CPU from this size on, and
# never in bf16 with AMX, whose products of narrow blocks are too slow.
BLOCKS, BLOCKS_FROM = 4, 512


class Product(Protocol):
    """alpha a b^T + beta add + diagonal I, where that is known to be symmetric. a, b [B, m, k]; add [B, m, m]."""

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        alpha: float = 1.0,
        add: Tensor | None = None,
        beta: float = 1.0,
        diagonal: float = 0.0,
    ) -> Tensor: ...


def newton_schulz_chunked(x: Tensor, coefficients: Coefficients, gram: bool | None = None) -> Tensor:
    """x [..., m, n] in its own dtype. gram: which form; None: the one with fewer operations."""
    return iterate(x, coefficients, symmetric_product, gram, half=x.dtype != torch.bfloat16)


def iterate(x: Tensor, coefficients: Coefficients, product: Product, gram: bool | None, half: bool) -> Tensor:
    """half: whether `product` computes half of a symmetric matrix, for the choice of the form."""
    if x.numel() == 0:
        return torch.empty_like(x)
    shape, tall = x.shape, x.shape[-2] > x.shape[-1]
    x = x.reshape(-1, *shape[-2:])
    x = x.mT if tall else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norm.clamp_min(SMALLEST).to(x.dtype)
    m, n = x.shape[-2:]
    if gram is None:
        gram = flops(m, n, len(coefficients), True, half) < flops(m, n, len(coefficients), False, half)
    x = _gram(x, coefficients, product) if gram else _direct(x, coefficients, product)
    return (x.mT if tall else x).reshape(shape)


def _direct(x: Tensor, coefficients: Coefficients, product: Product) -> Tensor:
    for a, b, c in coefficients:
        square = product(x, x)
        x = torch.baddbmm(x, product(square, square, c, square, b), x, beta=a)
    return x


def _gram(x: Tensor, coefficients: Coefficients, product: Product) -> Tensor:
    r = product(x, x)
    q: Tensor | None = None
    for step, (a, b, c) in enumerate(coefficients):
        if q is not None and step % RESTART == 0:
            x = q @ x
            r, q = product(x, x), None
        p = product(r, r, c, r, b, a)
        q = p if q is None else product(p, q)
        if (step + 1) % RESTART and step + 1 < len(coefficients):
            r = product(p, product(r, p))
    assert q is not None
    return q @ x


def symmetric_product(
    a: Tensor, b: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 1.0, diagonal: float = 0.0
) -> Tensor:
    """As Product says: upper blocks are computed and mirrored, where that is faster than the whole."""
    m = a.shape[-2]
    if m >= BLOCKS_FROM and a.dtype != torch.bfloat16 and a.device.type == "cpu":
        out = torch.empty(a.shape[0], m, m, dtype=a.dtype, device=a.device)
        size = -(-m // BLOCKS)
        for low in range(0, m, size):
            high = min(low + size, m)
            rows, others = a[:, low:high], b[:, low:].mT
            upper = (
                torch.bmm(rows, others)
                if add is None
                else torch.baddbmm(add[:, low:high, low:], rows, others, beta=beta, alpha=alpha)
            )
            out[:, low:high, low:] = upper
            out[:, high:, low:high] = upper[..., high - low :].mT
        out = out if add is not None or alpha == 1.0 else out.mul_(alpha)
    elif add is None:
        out = torch.bmm(a, b.mT)
        out = out if alpha == 1.0 else out.mul_(alpha)
    else:
        out = torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def flops(m: int, n: int, steps: int, gram: bool, half: bool) -> float:
    """Operations (2 a multiply-add) for one m x n matrix. half: of symmetric products only half is computed."""
    m, n = min(m, n), max(m, n)
    symmetric = 1.0 if half else 2.0  # of a product with m x m results, by m^2 or m^3
    if not gram:
        return steps * (symmetric * m * m * n + symmetric * m**3 + 2.0 * m * m * n)
    runs = [min(RESTART, steps - first) for first in range(0, steps, RESTART)]
    cubes = sum(run + (run - 1) + 2 * (run - 1) for run in runs)  # R^2, P Q, P R P
    return len(runs) * (symmetric + 2.0) * m * m * n + symmetric * cubes * m**3  # X X^T, Q X
