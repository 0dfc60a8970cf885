from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.plan.chip import RAMP, Chip
from launch.plan.source import with_
from launch.plan.step_time import CASTS, CLIP, FUSED, TRAFFIC, UPDATE, step_time, update_bytes
from parallel.fabric.topology import Fabric, Switch
from pretrain.config import RunConfig
from pretrain.estimate.costs import Collective
from pretrain.estimate.hardware import Hardware
from pretrain.estimate.update import Updated, scratch
from pretrain.optim.adamw import AdamWConfig
from pretrain.optim.lamb import LAMBConfig
from tests.launch.plan.cases import BANDWIDTH, RUN, chip, costs

# all_gather of S bytes over 2 ranks: S / 2 / 1e9 seconds.
FABRIC = Fabric(node=Switch(gpus=8, gpu_gbs=1, hop_us=0), launch_us=0)
CONFIG = RunConfig.model_validate({**RUN, "train": {**RUN["train"], "clip": None}})
CAST = CASTS["bf16"] * 1e6 / BANDWIDTH  # seconds of the casts of one million weights


def gather(seconds: float, calls: float = 1.0, hidden: bool = True, axis: str = "shard_cp") -> Collective:
    return Collective(axis, "all_gather", "parameters", seconds * 2e9, calls, 2, 2, hidden)


def copies(*messages: Collective) -> float:
    """Seconds of the copies around them, of 2 ranks: the whole read and written, and of a rank's half 2 or 3 times its bytes."""
    return sum(each.total * {"all_gather": 3.0, "reduce_scatter": 3.5}[each.op] for each in messages) / BANDWIDTH


def reduce(seconds: float, calls: float = 1.0) -> Collective:
    return Collective("shard_cp", "reduce_scatter", "gradients", seconds * 2e9, calls, 2, 2, True)


def time(found: Any, config: RunConfig = CONFIG, kept: float = 0.0, overlap: float = 1.0) -> Any:
    return step_time(found, config, chip(), FABRIC, kept, overlap)


def test_products_alone() -> None:
    found = time(costs(seconds=1.0))
    assert found.products == pytest.approx(1.0)
    assert found.small == pytest.approx(0.0, abs=1e-9)
    assert found.memory == pytest.approx(CAST)
    assert found.seconds == pytest.approx(1.0 + CAST)


def test_a_pipeline_of_equal_stages_takes_micro_batches_plus_stages_minus_one() -> None:
    alone = time(costs(stages=1, micro_batches=8, seconds=8.0)).seconds
    found = time(costs(stages=4, micro_batches=8, seconds=8.0))
    assert found.idle == pytest.approx(alone * 3 / 8)
    assert found.seconds == pytest.approx(alone * (8 + 4 - 1) / 8)


def test_memory_and_update_by_bytes() -> None:
    found = time(costs(seconds=1.0, micro_batches=2, parameters=1_000_000), kept=3e6)
    assert found.memory == pytest.approx(2 * CAST + TRAFFIC * 2 * 3e6 / BANDWIDTH)
    assert found.optimizer == pytest.approx(FUSED * 1e6 / BANDWIDTH)
    clipped = time(costs(parameters=1_000_000), with_(CONFIG, train={"clip": 1.0}))
    assert clipped.optimizer == pytest.approx((FUSED + CLIP) * 1e6 / BANDWIDTH)
    for optimizer in (AdamWConfig(fused=False), LAMBConfig()):
        unfused = time(costs(parameters=1_000_000), CONFIG.model_copy(update={"optimizer": optimizer}))
        assert unfused.optimizer == pytest.approx(UPDATE * 1e6 / BANDWIDTH)


@pytest.mark.parametrize("fused", [None, True, False])
def test_time_memory_and_the_optimizer_itself_agree_on_what_is_fused(fused: bool | None) -> None:
    optimizer = AdamWConfig(fused=fused)
    assert optimizer.build(torch.nn.Linear(2, 2)).param_groups[0]["fused"] is optimizer.fuses("cpu")
    assert optimizer.fuses("cuda") is (fused is not False) and optimizer.fuses("meta") is (fused is True)
    assert (scratch(optimizer, Updated(9, 5, 0, 9)) == 0.0) is optimizer.fuses("cuda")
    assert (update_bytes(CONFIG.model_copy(update={"optimizer": optimizer})) == FUSED) is optimizer.fuses("cuda")


def test_recomputation_takes_its_flops_again() -> None:
    full = with_(CONFIG, train={"recompute": "full"})
    assert time(costs(seconds=3.0, recomputed=1 / 3), full).recomputed == pytest.approx(1.0)
    assert time(costs(seconds=3.0, recomputed=1 / 3), full, kept=BANDWIDTH).recomputed == pytest.approx(3.0)


def test_messages_that_nothing_hides() -> None:
    found = time(costs(collectives=(gather(0.25, hidden=False, axis="tp"),)))
    assert found.exposed == pytest.approx(0.25)
    assert found.hidden == 0.0


def test_hidden_messages_expose_one_call() -> None:
    found = time(costs(collectives=(gather(0.1, calls=5),)))
    assert found.exposed == pytest.approx(0.1)
    assert found.hidden == pytest.approx(0.4)


def test_messages_longer_than_the_computation_stick_out() -> None:
    found = time(costs(collectives=(gather(0.1, calls=50),)))
    assert found.exposed == pytest.approx(5.0 - found.computing)
    assert found.seconds == pytest.approx(5.0)


def test_gradients_hide_behind_the_last_backward_pass_only() -> None:
    four = costs(micro_batches=4, seconds=4.0, collectives=(reduce(0.1, calls=20),))
    last = (4.0 + 4 * CAST + copies(reduce(0.1, calls=20))) * 2 / 3 / 4
    assert time(four).exposed == pytest.approx(2.0 - last)
    each = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"reduce_each_micro_batch": True})})
    assert time(four, each).exposed == pytest.approx(0.1)


def test_gathers_and_gradients_share_the_links() -> None:
    messages = gather(0.01, calls=60), reduce(0.01, calls=60)
    found = time(costs(seconds=1.0, collectives=messages))
    assert found.memory == pytest.approx(CAST + copies(*messages))
    assert found.exposed == pytest.approx(1.2 - (1.0 + CAST + copies(*messages)))


def test_without_overlap_all_is_exposed() -> None:
    found = time(costs(collectives=(gather(0.1, calls=5), reduce(0.1, calls=2))), overlap=0.0)
    assert found.exposed == pytest.approx(0.7)
    assert found.hidden == pytest.approx(0.0)


def test_a_group_of_one_says_nothing() -> None:
    alone = Collective("shard_cp", "all_gather", "parameters", 1e12, 5.0, 1, 1, False)
    assert time(costs(collectives=(alone,))).exposed == 0.0


def test_the_slowest_stage_sets_the_pace() -> None:
    slow, fast = costs(stages=2, micro_batches=4, seconds=6.0), costs(stages=2, micro_batches=4, seconds=2.0)
    mixed = slow.__class__(**{**slow.__dict__, "stages": (slow.stages[0], fast.stages[0])})
    found = time(mixed)
    assert found.products == pytest.approx(6.0)
    # While the pipeline fills and drains, the slow stage waits for one micro-batch of the fast one.
    assert found.idle == pytest.approx((2.0 + 4 * CAST) / 4)


def test_two_hundred_gflop_reach_nine_tenths() -> None:
    hardware = Hardware.model_validate(
        {"name": "x", "match": ["MI300X"], "bf16_tflops": 668 / 0.51, "fp32_tflops": 1, "memory_gib": 1,
         "memory_bandwidth_gbs": 1e5}
    )  # fmt: skip
    found = Chip.of(hardware, "bf16")
    assert found.ceiling == pytest.approx(668e12)
    m = 200e9 / 2 / 4096 / 4096
    assert 200e9 / found.product(m, 4096, 4096, 2) == pytest.approx(0.9 * 668e12)
    assert found.ramp == RAMP


def test_a_product_is_bound_by_its_bytes_when_flat() -> None:
    assert chip().product(1, 1000, 1000, 2) == pytest.approx(2 * (1000 * 1000 + 2000) / BANDWIDTH)
    assert chip().product(0, 1000, 1000, 2) == 0.0


def test_measured_rates_take_the_place_of_assumptions() -> None:
    measured = {
        "date": "2026-01-01", "device": "x", "torch": "2", "memory_gbs": {"triad": 50.0}, "matmul_tflops": {"bf16": 40.0},
        "matmul": [
            [256, 256, 256, "bf16", "nn", 10.0], [256, 256, 256, "bf16", "nt", 30.0], [4096, 4096, 4096, "bf16", "nn", 40.0],
        ],
    }  # fmt: skip
    hardware = Hardware.model_validate(
        {"name": "x", "bf16_tflops": 100, "fp32_tflops": 1, "memory_gib": 1, "memory_bandwidth_gbs": 1e3,
         "measured": measured}
    )  # fmt: skip
    found = Chip.of(hardware, "bf16")
    assert (found.ceiling, found.bandwidth, found.ramp) == (40e12, 50e9, 0.0)
    assert found.rate(256, 256, 256) == pytest.approx(15e12)  # two halves at 10 and 30 take as long as all at 15
    assert found.rate(4096, 4096, 4096) == pytest.approx(40e12)
    assert 15e12 < found.rate(1024, 1024, 1024) < 40e12
    told = Chip.of(hardware, "bf16", efficiency=0.5)
    assert (told.ceiling, told.measured) == (50e12, None)
    assert any("not measured" in note for note in Chip.of(hardware, "fp32").notes)
