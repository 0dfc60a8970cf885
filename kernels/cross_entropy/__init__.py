"""Cross-entropy of a linear head, without ever holding all the logits.

    loss_n = logsumexp(z_n) - z_n[target_n] + z_loss * logsumexp(z_n)^2      with z_n = weight x_n + bias

Source: chunks over tokens with the gradient taken in the forward, Liger (2410.10989); z-loss, PaLM (2204.02311) section
5; label smoothing, Szegedy et al. 2015 (1512.00567).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cross_entropy.logits import Shard, Terms
from kernels.dispatch import Form, Request, choose, triton_objection

__all__ = ["FORMS", "LOGITS_FORMS", "Shard", "Terms", "linear_cross_entropy", "token_losses"]


def _reference_why_not(request: Request) -> str | None:
    return "the reference holds all rows of the vocabulary" if request.options.get("shard") else None


FORMS = (
    Form("triton", "kernels.cross_entropy.triton", "linear_cross_entropy", triton_objection),
    Form("chunked", "kernels.cross_entropy.chunked", "linear_cross_entropy"),
    Form("reference", "kernels.cross_entropy.reference", "linear_cross_entropy", _reference_why_not),
)
LOGITS_FORMS = (
    Form("triton", "kernels.cross_entropy.triton", "token_losses", triton_objection),
    Form("chunked", "kernels.cross_entropy.logits", "token_losses"),
)
REDUCTIONS = ("sum", "mean", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """The training loss of a language model's head.

    Args:
        x: [N, D] final hidden states. Its dtype is the dtype of the matrix products, whatever autocast says.
        weight: [vocabulary, D]. Cast to x's dtype once a call; its gradient is summed in fp32, returned in its dtype.
        targets: int64 [N]; tokens whose target is ignore_index have loss 0 and no gradient.
        bias: [vocabulary] or None.
        z_loss: factor on the squared log of the partition function, which keeps logits from drifting.
        label_smoothing: share of the target's probability spread evenly over the vocabulary, 0 <= label_smoothing < 1.
        reduction: "sum" over tokens, "mean" over the tokens not ignored (0 if there are none), or "none".
        chunk: tokens whose logits are held at a time; chosen from the vocabulary by default.
        shard: where ranks share out the vocabulary: weight and bias are this rank's rows of it, x and targets the same on all
            ranks. Every rank gets the whole loss, and of x's gradient its rows' part: the sum over ranks is x's. One exchange
            of four numbers a token, for each chunk, in the forward (with reduction "none" in the backward as well).

    Returns the loss, fp32 (fp64 for fp64 x): a scalar, or [N] for reduction "none". Softmax and sums are in fp32.

    Raises ValueError for shapes, dtypes or targets that do not fit, naming the argument.
    """
    _check(x, weight, targets, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if z_loss < 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    _check_targets(targets, weight.shape[0] if shard is None else shard.vocabulary, ignore_index)
    request = Request(
        op="linear_cross_entropy",
        device=x.device,
        dtype=x.dtype,
        shape={"N": x.shape[0], "D": x.shape[1], "vocabulary": weight.shape[0]},
        options={
            "reduction": reduction,
            "bias": bias is not None,
            "label_smoothing": label_smoothing,
            "shard": shard is not None,
        },
    )
    form = choose(FORMS, request).load()
    more = {} if shard is None else {"shard": shard}
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = form(
            x,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            reduction=reduction,
            chunk=chunk,
            **more,
        )
        return loss


def token_losses(
    logits: Tensor,
    targets: Tensor,
    factor: Tensor,
    terms: Terms,
    *,
    bias: Tensor | None = None,
    learn: bool = True,
    shard: Shard | None = None,
) -> Tensor:
    """Losses of a chunk of logits, which are overwritten by their gradient: for callers with a loop over chunks of their own.

    logits: contiguous [C, V], without the bias. targets: int64 [C], of the whole vocabulary, none ignored. factor: fp32 (fp64
    for fp64 logits) [C], each token's upstream gradient, 0 to ignore it. learn: False leaves in logits no gradient but scraps.
    shard: see linear_cross_entropy. Returns fp32 or fp64 [C]. Collective with a shard. Not differentiable.
    """
    assert logits.is_contiguous() and targets.shape == factor.shape == logits.shape[:1]
    request = Request("token_losses", logits.device, logits.dtype, {"C": logits.shape[0], "V": logits.shape[1]})
    losses: Tensor = choose(LOGITS_FORMS, request).load()(logits, bias, targets, factor, terms, learn, shard)
    return losses


def _check(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [N, D] (flatten batch and time first), got {x.dtype} {tuple(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [vocabulary, D] with D = {x.shape[1]} as in x, got {tuple(weight.shape)}")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{x.shape[0]}] as x, got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight's rows, got {tuple(bias.shape)}")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    # The values are read on the CPU only: reading them on a GPU would stall it.
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{n}] = {int(targets[n])} is neither a row of weight (0..{vocabulary - 1}) "
            f"nor ignore_index={ignore_index}"
        )
