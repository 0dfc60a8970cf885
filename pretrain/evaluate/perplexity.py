"""Validation loss in nats per token and bits per byte of text.

Bits per byte counts the text's bytes, not the tokens, so it compares models with different tokenizers, and models with
compressors: what `xz -9` reaches on the same text is a bits-per-byte figure too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.processes import Processes
from pretrain.data.loader import Batch


def loss_of(model: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    """For `score`: the summed loss of a batch by a whole model."""
    return lambda batch: model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens)


@torch.no_grad()
def score(
    loss_of: Callable[[Batch], Tensor],
    model: nn.Module,
    batches: Iterable[Batch],
    token_bytes: Tensor | None,
    processes: Processes,
    precision: str,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Sums the cross entropies of all targets over all ranks.

    loss_of: a batch -> this rank's share of its summed cross entropy. mesh: where ranks have parts of one batch.
    token_bytes: int [vocabulary], how many bytes of text each token stands for; None when the corpus has no such table.
    Returns validation_loss (nats per scored token), bits_per_byte (nan without a table), scored_tokens, scored_bytes.
    """
    training = model.training
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    table = None if token_bytes is None else torch.as_tensor(token_bytes).to(processes.device)
    for batch in batches:
        batch = batch.to(processes.device)
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=precision == "bf16"):
            nats += float(loss_of(batch))
        tokens += batch.scored
        size += 0 if table is None else batch.bytes_scored(table)
    model.train(training)
    if mesh is not None and not mesh.counts_tokens:
        tokens = size = 0
    nats, tokens_all, bytes_all = processes.sum([nats, tokens, size])
    return {
        "validation_loss": nats / max(1, tokens_all),
        "bits_per_byte": nats / math.log(2) / bytes_all if bytes_all else math.nan,
        "scored_tokens": int(tokens_all),
        "scored_bytes": int(bytes_all),
    }
