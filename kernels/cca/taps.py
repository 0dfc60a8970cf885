"""Both convolutions as one, and the way back from its gradient to theirs.

Nothing stands between the two, and both see the same zeros (or columns) before a sequence. Hence

    s[t, j] = offset[j] + sum_n z[t - n, j] taps[j, n],      n = 0 ... W0 + W1 - 2
    taps[j, n] = sum of diag(depthwise[j, :, W0 - 1 - a]) grouped[j, W1 - 1 - b] over a + b = n
    offset[j] = grouped_bias[j] + depthwise_bias[j] sum_i grouped[j, i]

W0 + W1 - 1 products take the place of W1 products and of the first convolution's passes, forward and backward: less time
where products are cheap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combined(depthwise: Tensor, depthwise_bias: Tensor, grouped: Tensor, grouped_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(taps [J, W0 + W1 - 1, d, d], offset [C]), fp32, of the parameters as `kernels.cca.cca` has them."""
    w, W = _by_head(depthwise, grouped)
    W0, W1 = w.shape[1], W.shape[1]
    taps = W.new_zeros(W.shape[0], W0 + W1 - 1, *W.shape[2:])
    for a in range(W0):
        taps[:, a : a + W1].addcmul_(W.flip(1), w[:, W0 - 1 - a, None, :, None])
    bias = depthwise_bias.to(W.dtype).view(W.shape[0], 1, -1)
    offset = torch.baddbmm(grouped_bias.to(W.dtype).view(W.shape[0], 1, -1), bias, W.sum(1))
    return taps, offset.flatten()


def separated(
    dtaps: Tensor, doffset: Tensor, depthwise: Tensor, depthwise_bias: Tensor, grouped: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of depthwise, depthwise_bias, grouped and grouped_bias, fp32."""
    w, W = _by_head(depthwise, grouped)
    W0, W1, d = w.shape[1], W.shape[1], W.shape[2]
    dw, dW = torch.zeros_like(w), torch.zeros_like(W)
    for a in range(W0):
        seen = dtaps[:, a : a + W1].flip(1)
        dW.addcmul_(seen, w[:, W0 - 1 - a, None, :, None])
        dw[:, W0 - 1 - a] = (seen * W).sum((1, 3))
    bias, dlast = depthwise_bias.to(W.dtype).view(-1, d, 1), doffset.view(-1, d)
    dW += (bias * dlast[:, None])[:, None]
    dbias = torch.bmm(W.sum(1), dlast[..., None])
    return dw.transpose(1, 2).reshape(-1, W0), dbias.flatten(), dW.flatten(1, 2), doffset


def _by_head(depthwise: Tensor, grouped: Tensor) -> tuple[Tensor, Tensor]:
    """depthwise as [J, W0, d] and grouped as [J, W1, d, d], fp32."""
    J, _, d = grouped.shape
    return depthwise.float().view(J, d, -1).transpose(1, 2), grouped.float().view(J, -1, d, d)
