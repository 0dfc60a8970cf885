"""engine.bucket_bytes is obeyed: the collectives of a step on gloo, counted, and the training they belong to."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from parallel.engines import DeepSpeedConfig, TorchConfig
from parallel.engines.units import units
from tests.parallel.fabric import bucket_ranks
from tests.parallel.fabric.bucket_ranks import LAYERS, block_bytes, gradient_bytes
from tests.ranks import TRAINING, run_ranks


def steps(*configs: Any, sizes: dict[str, int] | None = None, preload: tuple[str, ...] = ()) -> Any:
    """(losses, norms, collectives) of rank 0 under each config."""
    return run_ranks(bucket_ranks.steps, 2, list(configs), sizes or {}, preload=preload)[0]


def same_training(found: Any) -> None:
    losses, norms, _ = found[0]
    for other in found[1:]:
        assert other[0] == pytest.approx(losses, rel=1e-5) and other[1] == pytest.approx(norms, rel=1e-5)


def test_sharded_blocks_join_until_they_fill_a_bucket() -> None:
    """FSDP2: one reduce-scatter for each unit; where two blocks and a half are wanted, there are three."""
    block = block_bytes()
    expected = {None: [1] * 6, block: [1] * 6, block * 5 // 2: [3, 3], 4 * block: [2, 4]}
    found = steps(*(TorchConfig(bucket_bytes=bucket) for bucket in expected))
    same_training(found)
    for blocks, (_, _, seen) in zip(expected.values(), found, strict=True):
        reduced = [size for name, size in seen if "reduce_scatter" in name]
        # Backward, so that the last unit, which may be small, comes first; then the root: embedding, head, norm.
        assert reduced[:-1] == [count * block for count in blocks]
        assert sum(reduced) >= sum(gradient_bytes()) and sum(blocks) == LAYERS
        gathered = [size for name, size in seen if "allgather" in name]
        # Each unit and the root in the forward pass, and units again in the backward pass.
        assert len(gathered) == 2 * len(blocks) + 1


def test_replicas_sum_in_buckets() -> None:
    bucket = 10_000
    found = steps(TorchConfig(), TorchConfig(bucket_bytes=bucket), sizes={"replicate": 2})
    same_training(found)
    whole, cut = ([size for name, size in seen if name == "allreduce" and size > 8] for _, _, seen in found)
    assert whole == [sum(gradient_bytes())]  # all of a small model fits into one bucket of 32 MiB
    assert sum(cut) == sum(gradient_bytes())
    assert all(bucket <= size < bucket + max(gradient_bytes()) for size in cut[:-1]) and len(cut) > 3


def test_deepspeed_fills_buckets_up_to_the_size() -> None:
    bucket = 10_000
    configs = [DeepSpeedConfig(), *(DeepSpeedConfig(stage=stage, bucket_bytes=bucket) for stage in (1, 2, 3))]
    found = steps(*configs, preload=TRAINING)
    same_training(found)
    whole, *cuts = ([size for name, size in seen if "reduce" in name and size > 64] for _, _, seen in found)
    assert len(whole) == 1
    for cut in cuts:
        assert len(cut) > 3 and sum(cut) == pytest.approx(sum(gradient_bytes()), rel=0.01)
        assert max(cut) <= max(bucket, max(gradient_bytes()))


def test_deepspeed_counts_elements() -> None:
    assert (
        DeepSpeedConfig(bucket_bytes=1 << 20).settings(None, False)["zero_optimization"]["reduce_bucket_size"]
        == 1 << 18
    )
    assert "reduce_bucket_size" not in DeepSpeedConfig().settings(None, False)["zero_optimization"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(5))
        self.further = nn.ModuleDict({"block": nn.Linear(10, 10, bias=False)})


def test_units() -> None:
    model = Model()
    blocks = [*model.blocks, model.further["block"]]

    def sizes(bucket: int | None, **options: Any) -> list[int]:
        return [len(unit) for unit in units(model, blocks, bucket, **options)]

    assert sizes(None) == [1] * 6
    assert sizes(400) == [1] * 6
    assert sizes(401) == [2, 2, 1, 1]  # the block of another list stays apart
    assert sizes(10**9) == [5, 1]
    assert sizes(800, ignored=set(model.blocks[0].parameters())) == [3, 2, 1]
    model.blocks[1].weight.requires_grad_(False)
    assert sizes(800) == [3, 2, 1]
    assert [block for unit in units(model, blocks, 800) for block in unit] == blocks
