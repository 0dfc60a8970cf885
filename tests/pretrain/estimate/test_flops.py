"""FLOPs of every mixer and FFN, of packed rows, of checkpointing, loss and optimizer: as torch counts them, the rest by hand."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Any

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.newton_schulz import COEFFICIENTS, newton_schulz
from parallel.recompute import apply_recompute
from pretrain.config import RunConfig
from pretrain.data.batch import IGNORE, Batch
from pretrain.estimate import budget
from pretrain.estimate.flops import documents, keys, model_per_token, per_token
from pretrain.estimate.layout import rank_costs
from pretrain.estimate.model import ModelCosts
from pretrain.estimate.update import iteration_flops
from pretrain.estimate.work import StepWork
from pretrain.model.mixers.attention import AttentionConfig
from pretrain.model.mixers.selective_attention import SelectiveAttentionConfig
from pretrain.model.sublayer import FFNConfig, MixerConfig
from tests.pretrain.estimate.counted import BY_HAND, counter, still
from tests.pretrain.estimate.settings import config
from tests.pretrain.families import FAMILIES, FFNS, MIXERS, build, kinds
from tests.pretrain.families import config as family_config

LENGTHS = (40, 17, 7)  # of the documents in a row
TOKENS = sum(LENGTHS)
PAIRS = sum(length * (length + 1) // 2 for length in LENGTHS)

# Where no count of real passes is expected: what they compute depends on values, or on how a kernel masks. Each has a test of
# its own below.
OTHERWISE = {"wide_attention", "smha", "smha_threshold", "union_threshold"}
STEPS = [f"mixer {name}" for name in MIXERS if name not in OTHERWISE]
STEPS += [f"ffn {name}" for name in FFNS if name not in OTHERWISE and name != "swiglu"]
STEPS += ["multi-token", "Peri-LN", "Qwen3-Next"]
USUAL = ("mixer attention", "mixer kda", "ffn hourglass_lifted", "ffn moe")


def run_of(family: str, **train: Any) -> RunConfig:
    raw = {
        "run": "run",
        "model": family_config(family).model_dump(mode="json"),
        "data": {"path": "corpus", "sequence_length": 32},
        "train": {"steps": 1, "batch": 1, "device": "cpu", "precision": "fp32", **train},
    }
    return RunConfig.model_validate(raw)


def row(*lengths: int) -> Batch:
    tokens = torch.randint(0, 256, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens.roll(-1, 1), torch.tensor([0, *lengths]).cumsum(0).int())


def counted_step(family: str, recompute: str | Sequence[str], batch: Batch) -> int:
    """recompute: of all layers, or of each."""
    model = build(family).train()
    layers = list(model.layers())
    modes: Any = [recompute] * len(layers) if isinstance(recompute, str) else recompute
    for layer, mode in zip(layers, modes, strict=True):
        apply_recompute([layer], mode)
    with still(), counter() as seen:
        model(batch.tokens, targets=batch.targets, cu_seqlens=batch.cu_seqlens).backward()
    return seen.get_total_flops()


def by_hand(family: str, *passes: int) -> float:
    """FLOPs of a row that torch does not see. passes: through all layers, or through each."""
    mixers = [layer.mixer or "" for layer in family_config(family).pattern()]
    # Values that a CPU's kernel fills up to the width of the keys: one product in a forward pass, two in a backward pass.
    filled = {"mla": 2 * PAIRS * 2 * 4}
    each = [TOKENS * BY_HAND.get(mixer, 0.0) - filled.get(mixer, 0) for mixer in mixers]
    return sum(map(mul, each, passes * len(each) if len(passes) == 1 else passes))


@pytest.mark.parametrize("family", STEPS)
def test_a_step_is_what_torch_counts(family: str) -> None:
    """Forward and backward over packed documents, embedding to loss, without checkpointing."""
    run, batch = run_of(family), row(*LENGTHS)
    work = StepWork(run, run.mesh.grid(1), gpu=False).of([batch])
    assert (work.idle, work.recomputed, work.update) == (0.0, 0.0, 0.0)
    assert work.hardware == counted_step(family, "none", batch) + by_hand(family, 3)
    model = ModelCosts.of(run).model
    useful = sum(length * model_per_token(model, length).training for length in LENGTHS)
    assert work.useful == pytest.approx(useful, rel=1e-12)
    assert (work.remade > 0) == (work.hardware > work.useful)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "family", [name if name in USUAL else pytest.param(name, marks=pytest.mark.campaign) for name in STEPS]
)
def test_a_step_with_checkpointing_is_what_torch_counts(family: str, recompute: Any) -> None:
    run, batch = run_of(family, recompute=recompute), row(*LENGTHS)
    work = StepWork(run, run.mesh.grid(1), gpu=False).of([batch])
    padded = by_hand(family, 3 if "mla" in family and recompute == "selective" else 4)
    assert work.hardware == counted_step(family, recompute, batch) + padded
    plain = run_of(family)
    assert (
        StepWork(plain, plain.mesh.grid(1), gpu=False).of([batch]).useful == work.useful
    )  # recomputation is not useful


def of_modes(family: str, *modes: Any) -> float:
    """FLOPs that a run counts whose budget of memory has led to these ways of its layers."""
    run, batch = run_of(family, memory_budget=1.0), row(*LENGTHS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "choose", lambda config, grid: budget.Choice(modes, (), (), ()))
        work = StepWork(run, run.mesh.grid(1), gpu=False).of([batch])
    assert (work.recomputed > 0) == (set(modes) != {"none"})
    return work.hardware


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("mixer attention", ("mixer", "none")),
        ("mixer attention", ("full", "selective")),
        ("mixer cca", ("mixer", "mixer")),
        ("ffn moe", ("ffn", "full")),
        ("ffn moe", ("mixer", "selective")),
        ("ffn hourglass_lifted", ("ffn", "ffn")),
        *(
            pytest.param(family, modes, marks=pytest.mark.campaign)
            for family in STEPS
            for modes in (("mixer", "none"), ("none", "ffn"), ("selective", "mixer"))
        ),
    ],
)
def test_a_step_within_a_budget_of_memory_is_what_torch_counts(family: str, modes: tuple[str, ...]) -> None:
    """Layers that are recomputed in different ways, and some of them not."""
    selective = 3 if "mla" in family else 4  # which keeps attention's results
    passes = {"none": 3, "ffn": 3, "mixer": 4, "full": 4, "selective": selective}
    padded = by_hand(family, *(passes[mode] for mode in modes))
    assert of_modes(family, *modes) == counted_step(family, modes, row(*LENGTHS)) + padded


def test_every_kind_has_a_proof() -> None:
    """A new mixer or FFN joins tests/pretrain/families.py, and so the counts above, or gets a test of its own."""
    assert unproven(MixerConfig, MIXERS) == set() == unproven(FFNConfig, FFNS)


def unproven(base: Any, families: dict[str, dict[str, Any]]) -> set[str]:
    """Kinds that a configuration can name and whose FLOPs no test here counts."""
    names = {name for name in families if any(name in family.split() for family in STEPS)} | {"swiglu"}
    by_themselves = {"smha"}  # test_selected_heads
    return kinds(base) - by_themselves - {families[name]["kind"] for name in names if name in families}


def test_a_kind_without_a_proof_is_noticed() -> None:
    assert unproven(MixerConfig, {name: each for name, each in MIXERS.items() if name != "retnet"}) == {"retnet"}
    assert unproven(FFNConfig, {name: each for name, each in FFNS.items() if each["kind"] != "moe"}) == {"moe"}


# ------------------------------------------------------------------------------------------------------ packed documents


@pytest.mark.parametrize("name", MIXERS)
def test_attention_is_counted_inside_documents(name: str) -> None:
    """Token by token: each sees itself and what comes before it in its document, as far as its window reaches."""
    mixer: Any = build(f"mixer {name}").blocks[0].mixer  # type: ignore[union-attr]
    for window in (mixer.window, 1, 9, 64) if hasattr(mixer, "window") else (None,):
        mixer.window = window
        every = sum(mixer.flops_per_token(float(seen + 1)) for length in LENGTHS for seen in range(length))
        assert sum(length * per_token(mixer, length).every for length in LENGTHS) == pytest.approx(every, rel=1e-12)


def test_keys_by_hand() -> None:
    assert [keys(4), keys(4, 4), keys(4, 9)] == [(1 + 2 + 3 + 4) / 4] * 3
    assert keys(4, 2) == (1 + 2 + 2 + 2) / 4
    assert documents([4, 7, 4]) == ((4, 2), (7, 1))


def test_scores_are_two_products_a_pair_of_tokens() -> None:
    attention = AttentionConfig.model_validate({"heads": 2, "kv_heads": 1, "head_dim": 16}).build(32)
    counts = per_token(attention, 9)
    assert 9 * counts.attention == 2 * 2 * 2 * 16 * 45 == 9 * 2 * counts.remade
    mla: Any = build("mixer mla").blocks[0].mixer  # type: ignore[union-attr]
    counts = per_token(mla, 9)
    assert (9 * counts.remade, 9 * counts.attention) == (45 * 2 * 2 * (8 + 4), 45 * 2 * 2 * (8 + 4 + 8))


def test_a_row_that_is_filled_up() -> None:
    """Padding, a document of its own without targets, is computed and is of no use."""
    run, batch = run_of("mixer attention"), row(*LENGTHS)
    batch.targets[0, 40:57] = IGNORE
    count = StepWork(run, run.mesh.grid(1), gpu=False)
    work, whole = count.of([batch]), count.of([row(*LENGTHS)])
    assert work.useful == pytest.approx(count.of([row(40, 7)]).useful) and work.idle == count.of([row(17)]).useful
    assert work.hardware == whole.hardware
    assert count.of([row(40), row(17, 7)]) == whole  # micro-batches


def test_ranks_that_work_on_a_batch_together_share_its_work() -> None:
    run = config("attention moe", train={"batch": 4, "recompute": "full"}, mesh={"tp": 2, "cp": 2, "pp": 2})
    one = config("attention moe", train={"batch": 4, "recompute": "full"})
    batch = row(100, 28)
    work = StepWork(run, run.mesh.grid(8), gpu=False).of([batch])
    alone = StepWork(one, one.mesh.grid(1), gpu=False).of([batch])
    assert work.useful == pytest.approx(alone.useful / 8) and work.remade == pytest.approx(alone.remade / 8)
    # All but the routers, which each rank of tp has whole, for its share of the tokens.
    assert work.recomputed == pytest.approx(alone.recomputed / 8, rel=0.02)


# ------------------------------------------------------------------------------------------ what depends on values or masks


def test_a_window_is_as_many_keys_at_most() -> None:
    mixer: Any = build("mixer wide_attention").blocks[0].mixer  # type: ignore[union-attr]
    assert mixer.window == 20
    assert per_token(mixer, 20).every > per_token(mixer, 19).every
    assert 64 * per_token(mixer, 64).attention == 4 * mixer.heads * mixer.head_dim * (20 * 21 / 2 + 44 * 20)


@pytest.mark.parametrize("name", ["smha", "smha_threshold"])
def test_selected_heads(name: str) -> None:
    """Half of the heads: their projections as torch counts them; of the scores a quarter."""
    mixer: Any = build(f"mixer {name}").blocks[0].mixer  # type: ignore[union-attr]
    share, heads, head_dim = 0.5, mixer.qkv.shape[0] * mixer.heads, mixer.head_dim
    dense = 2.0 * share * (mixer.qkv.numel() + mixer.out.numel()) + mixer.routing.flops_per_token()
    counts = per_token(mixer, 24)
    assert counts.every == dense + 4.0 * heads * head_dim * share**2 * 25 / 2
    assert counts.attention == pytest.approx(4.0 * heads * head_dim * share**2 * 25 / 2)


def test_all_heads_selected_are_what_torch_counts() -> None:
    width = 32
    raw = {"heads": 4, "top_k": 4}
    mixer = SelectiveAttentionConfig.model_validate(raw).build(width)
    x = torch.randn(1, 24, width, generator=torch.Generator().manual_seed(0))
    from pretrain.model.sequence import SequenceContext

    sequence = SequenceContext.of(torch.zeros(1, 24, dtype=torch.int64), None)
    with counter() as seen, torch.no_grad():
        mixer(x, sequence, None)
    assert seen.get_total_flops() == 24 * per_token(mixer, 24).every


def test_capacity_bounds_what_a_long_document_selects() -> None:
    raw = {"heads": 4, "top_k": 2, "capacity": 10}
    mixer = SelectiveAttentionConfig.model_validate(raw).build(32)
    short, long = per_token(mixer, 10), per_token(mixer, 100)
    router, dense = mixer.routing.flops_per_token(), 2.0 * (mixer.qkv.numel() + mixer.out.numel())
    n, d = mixer.qkv.shape[0] * mixer.heads, mixer.head_dim
    for counts, share, length in ((short, 0.5, 10), (long, 0.1, 100)):
        assert counts.attention == pytest.approx(4 * n * d * share**2 * (length + 1) / 2)
        assert counts.every == pytest.approx(counts.attention + share * dense + router)


def test_a_union_by_thresholds_counts_the_share_it_aims_at() -> None:
    ffn: Any = build("ffn union_threshold").blocks[0].ffn  # type: ignore[union-attr]
    shards = 2.0 * (ffn.up.numel() + ffn.down.numel())
    assert per_token(ffn, 9).every == 0.5 * shards + ffn.routing.flops_per_token()


def test_a_fixed_matrix_has_no_gradient() -> None:
    ffn: Any = build("ffn hourglass_lifted").blocks[0].ffn  # type: ignore[union-attr]
    counts = per_token(ffn, 9)
    assert counts.fixed == 2 * 48 * 32 and counts.training == 3 * counts.every - counts.fixed


# ---------------------------------------------------------------------------------------------------- loss and optimizer


@pytest.mark.parametrize(("reduction", "products"), [("sum", 3), ("none", 4)])
def test_the_fused_loss_makes_no_logits_twice_in_training(reduction: str, products: int) -> None:
    """Its gradients come with its logits; only losses token by token, which no training uses, are made from logits made anew."""
    x, weight = torch.randn(24, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    with counter() as seen:
        linear_cross_entropy(x, weight, torch.arange(24), reduction=reduction).sum().backward()
    assert seen.get_total_flops() == products * 2 * 24 * 16 * 40


@pytest.mark.parametrize("shape", [(48, 160), (64, 64), (200, 72), (516, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_is_what_torch_counts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In either form, whole products or, in fp32 from 512 on, the upper blocks of symmetric ones."""
    for name in COEFFICIENTS:
        with counter() as seen:
            newton_schulz(torch.randn(*shape, dtype=dtype), name)
        steps = len(COEFFICIENTS[name])
        counted = iteration_flops(*shape, steps, dtype == torch.bfloat16, gpu=False)
        assert counted == pytest.approx(seen.get_total_flops(), rel=1e-12)


def test_newton_schulz_on_gpus_by_hand() -> None:
    """Half of each symmetric product: X X^T, its square, and the whole product with X; a square matrix five times over."""
    assert iteration_flops(64, 64, 5, low=True, gpu=True) == 5 * (1 + 1 + 2) * 64**3
    assert iteration_flops(64, 64, 5, low=True, gpu=False) == 5 * (2 + 2 + 2) * 64**3


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["attention moe", "multi-token"])
def test_an_update_is_what_torch_counts(model: str, precision: str) -> None:
    """Muon's products in a real step; other optimizers make none."""
    for optimizer in ({"kind": "muon", "precision": precision, "per_head": True}, {"kind": "adamw"}, {"kind": "lamb"}):
        run = config(model, optimizer=optimizer)
        real: Any = ModelCosts.of(run).model.to_empty(device="cpu")
        for parameter in real.parameters():
            torch.nn.init.normal_(parameter)
            parameter.grad = torch.randn_like(parameter)
        made = run.optimizer.build(real)
        with counter() as seen:
            made.step()
        work = StepWork(run, run.mesh.grid(1), gpu=False).of([row(9)])
        costs = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1))
        assert work.update == costs.update == seen.get_total_flops()
        assert (work.update > 0) == (optimizer["kind"] == "muon")


def test_an_update_is_shared_out() -> None:
    """By the ranks of a pipeline stage, of which none can do less than the dearest matrix of its own."""
    muon: dict[str, Any] = {"optimizer": {"kind": "muon"}, "train": {"batch": 8}}
    one = config("gated delta net", **muon)
    alone = rank_costs(ModelCosts.of(one), one, one.mesh.grid(1)).update
    for mesh, ranks in (({"dp": 2}, 2), ({"tp": 2, "cp": 2}, 4)):
        many = config("gated delta net", mesh=mesh, **muon)
        assert rank_costs(ModelCosts.of(many), many, many.mesh.grid(ranks)).update == alone / ranks
    piped = config("gated delta net", mesh={"pp": 2}, **muon)
    stages = rank_costs(ModelCosts.of(piped), piped, piped.mesh.grid(2)).stages
    assert sum(stage.update for stage in stages) == alone
    most = config("gated delta net", mesh={"dp": 1000}, **(muon | {"train": {"batch": 1000}}))
    dearest = iteration_flops(160, 64, len(COEFFICIENTS["tuned"]), True, gpu=False)
    assert rank_costs(ModelCosts.of(most), most, most.mesh.grid(1000)).update == dearest


# ------------------------------------------------------------------------------------------------------------ many ranks


def test_the_whole_model_and_a_rank_of_many() -> None:
    one = config("attention moe", train={"batch": 8, "micro_batch": 2})
    model = ModelCosts.of(one)
    per = model.forward(128).training
    assert rank_costs(model, one, one.mesh.grid(1)).flops == per * 8 * 128
    for mesh in ({"dp": 4}, {"dp": 2, "tp": 2}, {"cp": 2, "tp": 2}, {"ep": 4}):
        many = config("attention moe", train={"batch": 8, "micro_batch": 2}, mesh=mesh)
        assert rank_costs(model, many, many.mesh.grid(4)).flops == per * 8 * 128 / 4
    piped = config("attention moe", train={"batch": 8, "micro_batch": 2}, mesh={"pp": 2})
    costs = rank_costs(model, piped, piped.mesh.grid(2))
    assert sum(stage.flops for stage in costs.stages) == pytest.approx(per * 8 * 128)


@pytest.mark.parametrize("recompute", ["none", "full", pytest.param("selective", marks=pytest.mark.campaign)])
def test_plans_and_metrics_count_alike(recompute: str) -> None:
    """A step of whole sequences: what rank_costs says of it, and what is counted from its batches."""
    run = config("attention moe", train={"batch": 4, "micro_batch": 2, "recompute": recompute})
    costs = rank_costs(ModelCosts.of(run), run, run.mesh.grid(1))
    work = StepWork(run, run.mesh.grid(1), gpu=False).of([row(128, 128)] * 2)
    assert (work.useful, work.recomputed, work.remade) == (costs.flops, costs.recomputed, costs.remade)
    assert work.hardware == costs.hardware_flops and (work.recomputed > 0) == (recompute != "none")


def test_families_have_all_that_is_asked_here() -> None:
    assert set(STEPS) <= set(FAMILIES)
