"""--dry-run on meshes of every kind: ranks, the batch that they share, and memory by hand counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.estimate.report import GIB, report
from pretrain.model.ffns.routed import RoutedFFN
from pretrain.train.build import build_model
from tests.pretrain.train.small_run import configuration

VOCABULARY = "model.vocabulary=512"


def rows(*overrides: str) -> dict[str, str]:
    text = report(configuration(Path("run"), Path("nowhere"), VOCABULARY, "model.width=256", *overrides))
    return {line[:22].strip(): line[22:] for line in text.splitlines()}


def gibibytes(*overrides: str) -> float:
    """Of weights, gradients and optimizer."""
    found = rows(*overrides)
    return sum(float(found[name].split()[0]) for name in ("weights", "gradients", "optimizer"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_ranks_are_those_of_the_whole_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows()["ranks"] == "1, torch engine"
    assert rows("mesh.dp=4")["ranks"] == "4, torch engine"
    assert rows("mesh.dp=4", "mesh.tp=2")["ranks"] == "8, torch engine: dp 4 x tp 2 = 8 rank(s)"
    assert rows("mesh.tp=2", "mesh.ep=4")["ranks"] == "4, torch engine: dp 2 x tp 2 = 4 rank(s); experts: edp 1 x ep 4"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rows("mesh.pp=2", "train.batch=8")["ranks"] == "8, torch engine: pp 2 x dp 4 = 8 rank(s)"
    assert rows("mesh.dp=2", "mesh.tp=2")["ranks"] == "4, torch engine: dp 2 x tp 2 = 4 rank(s)"


def test_the_batch_is_shared_by_data_parallel_ranks_only() -> None:
    assert "4 sequences" in rows("mesh.dp=4", "mesh.tp=2", "train.batch=4")["tokens a step"]
    with pytest.raises(ConfigError, match=r"heads=2 of blocks\.0\.mixer .* cannot be cut over mesh\.tp=4"):
        rows("mesh.tp=4")
    with pytest.raises(ConfigError, match=r"train\.batch = 4: not a multiple of 8 data-parallel rank"):
        rows("mesh.dp=8", "train.batch=4")


def test_sizes_that_do_not_fit_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match="mesh: pp=2 x tp=4 = 8 does not divide 12 rank"):
        rows("mesh.pp=2", "mesh.tp=4")
    with pytest.raises(ConfigError, match=r"mesh\.ep=3 does not divide"):
        rows("mesh.dp=2", "mesh.ep=3")


def test_memory_by_hand() -> None:
    config = configuration(Path("run"), Path("nowhere"), VOCABULARY, "model.width=256")
    with torch.device("meta"):
        model = build_model(config)
    (moe,) = (m for m in model.modules() if isinstance(m, RoutedFFN))
    routed = moe.gate_up.numel() + moe.down.numel()
    assert routed == 4 * 3 * 256 * 16
    other = sum(p.numel() for p in model.parameters()) - routed
    # Thousandths of a GiB are shown: count with a large vocabulary.
    other += sum(p.numel() // 512 * (2**20 - 512) for p in model.parameters() if 512 in p.shape)
    big = "model.vocabulary=1048576"
    assert other > 2**28

    def expected(value: float) -> object:
        return pytest.approx(value / GIB, abs=2e-3)

    one = "train.batch=8", "train.micro_batch=8", big  # one micro-batch a step: gradients are sharded, too
    assert gibibytes(*one) == expected(16 * (routed + other))
    # Half of the table each, and of everything else much less; tied to the head, it lies at both ends of the pipeline.
    table = 2**20 * 256
    piped = gibibytes("train.batch=8", "train.micro_batch=4", big, "mesh.tp=2", "mesh.pp=2")
    assert piped == pytest.approx(16 * table / 2 / GIB, rel=2e-3)
    many = "train.batch=8", "train.micro_batch=1", big
    assert gibibytes(*many, "mesh.dp=4") == expected((12 / 4 + 4) * (routed + other))
    assert gibibytes(*many, "mesh.dp=4", "mesh.replicate=2") == expected((12 / 2 + 4) * (routed + other))
    zero = gibibytes(*many, "mesh.dp=4", "mesh.cp=2", "engine={kind: deepspeed, stage: 2}")
    assert zero == expected((4 + 4 / 8 + 12 / 8) * (routed + other))


def test_experts_are_cut_by_their_own_axis() -> None:
    huge = "model.ffns.moe.hidden=65536"  # 4 experts of 3 x 256 x 65536
    experts = 4 * 3 * 256 * 65536
    whole = gibibytes(huge, "train.batch=8", "train.micro_batch=8")
    assert whole == pytest.approx(16 * experts / GIB, rel=0.01)
    one = huge, "train.batch=8", "train.micro_batch=1"
    # Without sharding of gradients: 4 bytes for every expert parameter held, 12 for its share among ranks that hold it.
    assert gibibytes(*one, "mesh.dp=4") == pytest.approx((4 + 12 / 4) * experts / GIB, rel=0.01)
    # Experts that ep spreads are sharded no further.
    assert gibibytes(*one, "mesh.dp=4", "mesh.ep=2") == pytest.approx(16 / 2 * experts / GIB, rel=0.01)
    assert gibibytes(*one, "mesh.dp=2", "mesh.tp=2", "mesh.ep=2", "mesh.expert_tensor=true") == pytest.approx(
        16 / 4 * experts / GIB, rel=0.01
    )


def test_the_summary_names_what_a_step_needs_and_sends() -> None:
    found = rows("mesh.dp=2", "mesh.tp=2", "train.recompute=full")
    assert found["memory a rank"].endswith("GiB at the peak, with the operators of a CPU")
    assert "full recomputation" in found["activations"] and "micro-batch of 32 tokens" in found["activations"]
    assert "recomputed, in 2 micro-batch(es)" in found["work a rank and step"]
    assert "(4 ranks a node; loads of experts taken as even)" in found["messages of a rank"]
    text = report(configuration(Path("run"), Path("nowhere"), VOCABULARY, "model.width=256", "mesh.dp=2", "mesh.tp=2"))
    table = [line.split() for line in text.partition("messages of a rank")[2].splitlines()[1:]]
    assert table[0] == ["axis", "op", "of", "calls", "bytes", "a", "call", "bytes", "a", "step", "ranks"]
    assert {(line[0], line[1]) for line in table[1:]} == {
        ("shard_cp", "all_gather"), ("shard_cp", "reduce_scatter"), ("tp", "all_gather"), ("tp", "reduce_scatter"),
        ("tp", "all_reduce"), ("world", "all_reduce"), ("dp_cp_tp", "all_reduce"),
    }  # fmt: skip


def test_a_pipeline_shows_its_stages() -> None:
    found = rows("mesh.pp=2", "train.batch=8", "train.micro_batch=2")
    assert found["pipeline bubble"] == "20.0 % of a step" and found["layers of each stage"] == "2, 0"  # and the head
    assert "on pipeline rank" in found["memory a rank"]
