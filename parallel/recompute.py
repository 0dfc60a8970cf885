"""Activation checkpointing, applied to a model's blocks from outside. It changes neither names nor results."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.compilation import is_compiled

Recompute = Literal["none", "full", "selective"]
Mode = Literal["none", "full", "selective", "mixer", "ffn"]
"""Of one block: as above, or one of its two sublayers alone in full."""

# What is dear to compute and cheap to keep: matrix products and fused attention. All else is computed again.
KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def apply_recompute(blocks: Iterable[nn.Module], mode: Mode) -> None:
    """Frees activations inside each block after its forward pass and computes them again in the backward pass.

    mixer, ffn: the activations of this sublayer alone; a block without one stays as it is.
    full: only a block's inputs are kept. selective: the results of matrix products and of attention are kept, too. Call it before
    the blocks are sharded, and after they are compiled. What is compiled is selective by itself: its backward
    pass computes again all that can be fused.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        if mode == "selective" and is_compiled(block):
            continue
        part = getattr(block, mode) if mode in ("mixer", "ffn") else block
        if part is not None:
            # In place of the method, not around the module: parameters keep their names, and FSDP2 its hooks.
            part.forward = partial(checkpoint, part.forward, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Inside an operator with a backward of its own (gradients are off there) products are scratch, overwritten as it goes.
    return CheckpointPolicy.MUST_SAVE if op in KEPT and torch.is_grad_enabled() else CheckpointPolicy.PREFER_RECOMPUTE
