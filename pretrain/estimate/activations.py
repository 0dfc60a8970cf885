"""The memory that one pipeline stage of a job needs for a micro-batch, beside parameters, gradients and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernels.cross_entropy.chunked import SLICE, SLICE_CPU, default_chunk
from kernels.cross_entropy.logits import BLOCK_LOGITS
from pretrain.estimate.engines import Stays
from pretrain.estimate.setting import Held, Setting
from pretrain.estimate.trace import Measured


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch in one stage. kept: from its forward to its backward pass. forward, backward: the most at a time,
    with what stays of layers (engines.Stays). between: of parameters that stay whole from a backward to the next forward pass."""

    kept: float
    forward: float
    backward: float
    between: float


def activations(setting: Setting, held: Held, stays: Stays) -> Activations:
    model, tokens = setting.model, setting.tokens
    of_kind = {kind: setting.measured(kind) for kind in held.counts}
    measured = [of_kind[kind] for kind in held.kinds]
    weighed = {kind: setting.weighed(kind) for kind in of_kind}
    left = {kind: stays.between * each.whole for kind, each in weighed.items()}
    grows = {kind: stays.sharded * each.whole + stays.spread * each.spread for kind, each in weighed.items()}
    stream = 4.0 * tokens / setting.grid.tp * model.width
    own = _around_layers(setting, held)
    kept, casts, forward = own.before, 0.0, own.before
    kept += max((m.shared for m in measured), default=0.0)
    starts: list[float] = []
    previous: Measured | None = None
    between = whole = sum(left[kind] for kind in held.kinds)
    for m, kind in zip(measured, held.kinds, strict=True):
        # What one layer hands on and the next one takes in is one tensor, whoever keeps it.
        starts.append(kept)
        whole -= left[kind]
        forward = max(forward, kept + casts + m.forward + whole + min(stays.at_work, between - whole))
        handed = (0.0, 0.0) if previous is None else (previous.own_stream, previous.own_state)
        kept += stays.gathered * weighed[kind].whole
        kept += m.inner + max(m.stream, handed[0]) + max(m.state, handed[1])
        casts += m.weights
        previous = m
    if previous is not None:
        kept += previous.own_state if held.last else 0.0
    if held.last:
        forward = max(forward, kept + casts + own.loss)
        kept += own.after
        grown = own.head_gradient if stays.fresh else 0.0
        backward = kept + own.loss_backward
    else:
        kept += stream  # what was sent stays for the backward pass
        grown, backward = 0.0, kept + stream
    for start, m, kind in zip(reversed(starts), reversed(measured), reversed(held.kinds)):
        gathered = whole + min(stays.at_work, between - whole)
        backward = max(backward, start + (m.fresh if stays.fresh else m.backward) + grown + gathered)
        grown, whole = grown + grows[kind], whole + left[kind]
    backward = max(backward, own.before + own.embedding_backward + grown + between)
    return Activations(kept, forward, backward, between)


@dataclass(frozen=True)
class Around:
    """Bytes of what is around the layers. before: kept by the embedding. after: kept by norm and loss. loss, loss_backward: the
    most at a time in its forward and its backward pass, besides what layers keep; embedding_backward: in that pass.
    head_gradient: of the head's weights."""

    before: float
    after: float
    loss: float
    loss_backward: float
    embedding_backward: float
    head_gradient: float


def _around_layers(setting: Setting, held: Held) -> Around:
    model, tp = setting.model, setting.grid.tp
    T, D, V, low = setting.tokens, model.width, model.vocabulary // tp, setting.low
    own = T / tp
    table = 4.0 * V * D
    before = 0.0
    if held.first:
        before += 8.0 * T + (T if tp > 1 else 0.0) * 2
        if model.model.config.block.residual_scaling:
            before += 4.0 * own * D
    if not held.last:
        return Around(before, 0.0, 0.0, 0.0, table + 4.0 * own * D, 0.0)
    losses = 2 if model.extra is not None else 1
    stream, normed = 4.0 * own * D, low * own * D
    after = stream + 4.0 * own + losses * (normed + table)
    chunk = min(default_chunk(T, V), T)
    scratch = chunk * V * low + (low * chunk * D * 2 if tp > 1 else 0.0)
    if low != 4:  # a part of the weight's gradient, and on a CPU a block of widened logits
        part = low * min(V * D, SLICE) if setting.way.gpu else (low + 4.0) * min(V * D, SLICE_CPU)
        scratch += part + (0.0 if setting.way.gpu else 4.0 * min(chunk * V, BLOCK_LOGITS))
    weight = low * V * D if low != 4 else 0.0
    extra = 0.0
    if model.extra is not None:
        measured = model.extra.traced(model.width, setting.length, replace(setting.way, recompute="none")).measured(T)
        extra = measured.inner + measured.stream + measured.state + 2 * stream + low * own * 2 * D
        after += extra
    loss = after + normed + weight + scratch
    loss_backward = stream if low != 4 else 0.0  # gradients are scaled in place
    return Around(before, after, loss, loss_backward, table + 4.0 * own * D, table)
