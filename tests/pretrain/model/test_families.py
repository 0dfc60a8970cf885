"""Every family at once: it learns real text, packs, decodes and counts, whatever it is made of."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest
import torch

from pretrain.optim.adamw import AdamWConfig
from tests.pretrain.families import ALL_KINDS, FAMILIES, FFNS, MIXERS, build

STEPS, BATCH, LENGTH = 200, 4, 48
# All families learn in a campaign; in every run these: each operator of the kernels, each kind of router, each kind of carry.
LEARN = (
    "mixer conv_attention", "mixer cca", "mixer mla", "mixer smha", "mixer gla", "mixer kda", "mixer mamba", "mixer mamba2",
    "ffn kat", "ffn hourglass", "ffn moe", "ffn union_threshold", "Qwen3-Next", "ZAYA1", "Peri-LN", "multi-token",
)  # fmt: skip


def test_every_kind_is_among_the_families() -> None:
    assert ALL_KINDS["mixers"] == {config["kind"] for config in MIXERS.values()}
    assert ALL_KINDS["ffns"] == {config["kind"] for config in FFNS.values()}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Bytes of the standard library's sources, int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in LEARN else pytest.mark.campaign) for name in FAMILIES]
)
def test_learns_real_text_in_bf16(family: str, text: torch.Tensor) -> None:
    """Within 200 steps the loss is below what the bytes' frequencies alone would give, without one NaN on the way."""
    share = torch.bincount(text, minlength=256).double() / len(text)
    frequencies = -(share * share.clamp(min=1e-30).log()).sum().item()  # 3.2 nats
    model = build(family).train()
    optimizer = AdamWConfig(lr=6e-3, weight_decay=0.01).build(model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 20, 2.0 * (STEPS - step) / STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows[:, :-1], targets=rows[:, 1:]) / (BATCH * LENGTH)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert math.isfinite(loss.item()) and math.isfinite(norm.item()), f"step {step}"
        optimizer.step()
        optimizer.zero_grad()
        for router in model.routers().values():
            router.rebalance(router.load.clone())
        losses.append(loss.item())
        if step >= 30 and sum(losses[-30:]) / 30 < frequencies - 0.2:
            break
    start, end = sum(losses[:5]) / 5, sum(losses[-30:]) / 30
    print(f"{family}: {start:.2f} -> {end:.2f} nats a byte after {len(losses)} steps")
    assert start > 5.0 and end < frequencies - 0.2, f"{start:.2f} -> {end:.2f}, frequencies {frequencies:.2f}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_sequences_alone(family: str) -> None:
    model = build(family, init_std=0.2).eval()
    lengths = [1, 19, 7, 40]
    rows = [torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with torch.inference_mode():
        packed = model(torch.cat(rows, dim=1), cu_seqlens=borders)
        alone = torch.cat([model(row) for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_full_forward(family: str) -> None:
    """A prompt, single steps, and a second prompt after them, for two rows at once."""
    model = build(family, init_std=0.2).eval()
    rows = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = model(rows)
        cache = model.new_cache()
        parts = [model(rows[:, :9], cache=cache)]
        parts += [model(rows[:, t : t + 1], cache=cache) for t in range(9, 15)]
        parts.append(model(rows[:, 15:], cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 24 and cache.bytes() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_prompts_fill_caches_that_go_on_by_themselves(family: str) -> None:
    model = build(family, init_std=0.2).eval()
    prompts, further = [1, 17, 6, 30], 5
    rows = [torch.randint(0, 256, (1, n + further), generator=torch.Generator().manual_seed(n)) for n in prompts]
    borders = torch.tensor([0, *prompts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with torch.inference_mode():
        cache = model.new_cache()
        packed = model(torch.cat([row[:, :n] for row, n in zip(rows, prompts)], dim=1), cu_seqlens=borders, cache=cache)
        with pytest.raises(ValueError, match=r"cache\.split"):
            model(rows[0][:, :1], cache=cache)
        for row, n, prompt, own in zip(rows, prompts, packed.split(prompts, dim=1), cache.split(), strict=True):
            assert own.length == n
            found = [
                prompt,
                *(model(row[:, t : t + 1], cache=own) for t in range(n, n + 3)),
                model(row[:, n + 3 :], cache=own),
            ]
            torch.testing.assert_close(torch.cat(found, dim=1), model(row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_output_depends_on_later_tokens(family: str) -> None:
    model = build(family, init_std=0.2).eval()
    row = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(4))
    changed = row.clone()
    changed[:, 25:] = 255 - changed[:, 25:]
    with torch.inference_mode():
        one, other = model(row), model(changed)
    torch.testing.assert_close(one[:, :25], other[:, :25], rtol=1e-5, atol=1e-5)
    assert (one[:, 25:] - other[:, 25:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_cover_every_matrix_that_a_token_meets(family: str) -> None:
    """Active parameters cost 2 FLOPs each at least; vectors cost nearly nothing. The recurrence comes on top."""
    model = build(family)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    products = model.active_parameters() - vectors - (0 if model.head is None else model.embedding.weight.numel())
    if model.multi_token is not None:
        products += model.embedding.weight.numel()  # the head once more
    ratio = model.flops_per_token(1.0) / (2.0 * products)
    assert 0.98 < ratio < 1.6, ratio
