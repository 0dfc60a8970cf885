"""What the ranks of test_buckets.py do: a training step, with every collective of the backward pass written down."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.engines import DeepSpeedConfig, TorchConfig
from pretrain.model.decoder import Decoder, DecoderConfig
from tests.parallel import deepspeed_ranks

LAYERS, WIDTH = 6, 16


class Collectives(TorchDispatchMode):
    """(name, bytes of the largest tensor) of every collective, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
            self.seen.append((name.strip("_"), max(each.numel() * each.element_size() for each in tensors)))
        return func(*args, **(kwargs or {}))


def model_of(name: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig.model_validate(
            {
                "vocabulary": 256,
                "width": WIDTH,
                "init_std": 0.3,
                "mixers": {"attention": {"kind": "attention", "heads": 2}},
                "ffns": {"mlp": {"kind": "swiglu", "hidden": 32}},
                "layers": [f"attention + mlp x{LAYERS}"],
            }
        )
    )


def block_bytes() -> int:
    """Bytes of one block's gradients."""
    return sum(4 * parameter.numel() for parameter in model_of("").blocks[0].parameters())


def gradient_bytes() -> list[int]:
    """Of each parameter."""
    return [4 * parameter.numel() for parameter in model_of("").parameters()]


def steps(rank: int, world: int, configs: list[TorchConfig | DeepSpeedConfig], sizes: dict[str, int]) -> list[Any]:
    """Two steps under each config -> (losses, norms, the second one's collectives by (name, bytes))."""
    deepspeed_ranks.model_of = model_of  # type: ignore[assignment]
    found = []
    for config in configs:
        engine = deepspeed_ranks.engine_of("", rank, world, config, **sizes)
        first = deepspeed_ranks.step(engine, rank, world)
        with Collectives() as collectives:
            second = deepspeed_ranks.step(engine, rank, world)
        losses = torch.tensor([first[0], second[0]])
        dist.all_reduce(losses)
        found.append((losses.tolist(), [first[1], second[1]], collectives.seen))
    return found
