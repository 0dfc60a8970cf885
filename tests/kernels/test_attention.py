"""Attention: the fast form against the definition, packing, grouped heads, windows, decoding, precision, refusals."""

import math

import pytest
import torch

from kernels.attention import attention, chunked


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(T=7, S=None, B=2, H=4, HKV=2, K=8, V=6, dtype=torch.float64):
    S = T if S is None else S
    return (
        draw(B, T, H, K, dtype=dtype),
        draw(B, S, HKV, K, dtype=dtype, seed=1),
        draw(B, S, HKV, V, dtype=dtype, seed=2),
    )


def run(tensors, **options):
    """[o, dq, dk, dv] for a fixed upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    o = attention(*leaves, **options)
    upstream = draw(*o.shape, dtype=o.dtype, seed=3).to(o.device)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream)]


def run_as(form, monkeypatch, tensors, **options):
    monkeypatch.setenv("BRAID_KERNELS", form)
    result = run(tensors, **options)
    monkeypatch.delenv("BRAID_KERNELS")
    return result


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


OPTIONS = [{}, {"causal": False}, {"window": 1}, {"window": 3}, {"window": 100}, {"scale": 0.3}]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keys, V", [(9, 8), (9, 6), (14, 8)])
def test_fast_form_is_the_definition(dtype, tolerance, options, keys, V, monkeypatch):
    tensors = operands(9, keys, V=V, dtype=dtype)
    ours = run_as("chunked", monkeypatch, tensors, **options)
    assert_same(ours, run_as("reference", monkeypatch, tensors, **options), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(3, 0, 5, 5, 7), (5, 5, 5, 5), (20,)], ids=str)
def test_packed_fast_form_is_the_definition(dtype, tolerance, options, lengths, monkeypatch):
    tensors = operands(20, B=1, dtype=dtype)
    options = {**options, "cu_seqlens": offsets(*lengths)}
    ours = run_as("chunked", monkeypatch, tensors, **options)
    assert_same(ours, run_as("reference", monkeypatch, tensors, **options), tolerance)


def test_definition_by_hand():
    """Two queries, one head, written out with a calculator's operations."""
    q, k, v = (
        torch.tensor([a, b], dtype=torch.float64).view(1, 2, 1, 1) for a, b in ((1.0, 2.0), (0.5, -1.0), (3.0, 5.0))
    )
    weight = 1 / (1 + math.exp(-2.0 - 1.0))  # of key 0 for query 1: exp(2 * 0.5) against exp(2 * -1)
    expected = torch.tensor([3.0, weight * 3 + (1 - weight) * 5], dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v).flatten(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_row_is_its_sequences_one_by_one(options):
    lengths = (3, 5, 1, 5, 6)
    q, k, v = operands(sum(lengths), B=1)
    packed = run((q, k, v), cu_seqlens=offsets(*lengths), **options)
    upstream = draw(*packed[0].shape, seed=3)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        leaves = [x[:, part].clone().requires_grad_() for x in (q, k, v)]
        o = attention(*leaves, **options)
        alone = [o.detach(), *torch.autograd.grad(o, leaves, upstream[:, part])]
        assert_same([x[:, part] for x in packed], alone, 1e-12)
        start += length


def test_equal_sequences_are_not_copied():
    """A batch of whole rows, the usual case, is read where it lies: also the slices of a fused projection."""
    fused, borders = draw(1, 12, 8, 8).requires_grad_(), offsets(4, 4, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:], cu_seqlens=borders)
    called = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not called & {"aten::cat", "aten::copy_", "aten::clone"}


def test_packed_sequences_with_caches():
    """Each packed sequence's queries are the last of its own keys."""
    q, k, v = operands(6, 14, B=1)
    o = attention(q, k, v, cu_seqlens=offsets(1, 5), cu_seqlens_k=offsets(6, 8), window=4)
    first = attention(q[:, :1], k[:, :6], v[:, :6], window=4)
    second = attention(q[:, 1:], k[:, 6:], v[:, 6:], window=4)
    torch.testing.assert_close(o, torch.cat([first, second], dim=1), atol=1e-12, rtol=0)


def test_grouped_heads_are_repeated_heads():
    q, k, v = operands(7, H=6, HKV=2)
    o, dq, dk, dv = run((q, k, v))
    repeated = run((q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)))
    assert_same([o, dq], repeated[:2], 1e-12)
    for ours, theirs in zip((dk, dv), repeated[2:]):
        torch.testing.assert_close(ours, theirs.unflatten(2, (2, 3)).sum(3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 40])
@pytest.mark.parametrize("keys", [12, 17])
def test_window_is_the_explicit_mask(window, keys):
    T = 12
    q, k, v = operands(T, keys, B=1, H=2, HKV=2)
    position = torch.arange(keys - T, keys)[:, None] - torch.arange(keys)[None, :]
    mask = (position >= 0) & (position < window)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    expected = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, window=window), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("step", [1, 3])
def test_decoding_with_a_cache_is_the_whole_sequence(window, step):
    q, k, v = operands(12)
    whole = attention(q, k, v, window=window)
    pieces = []
    for end in range(step, 13, step):
        pieces.append(attention(q[:, end - step : end], k[:, :end], v[:, :end], window=window))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 2}, {"cu_seqlens": offsets(2, 3)}], ids=str)
def test_gradcheck(options):
    tensors = [x.requires_grad_() for x in operands(5, B=1, H=2, HKV=1, K=3, V=2)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options), tensors)


@pytest.mark.parametrize("T", [1, 40, 300])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 33}], ids=str)
def test_bf16_error_is_that_of_rounding(T, options):
    """Against fp64 on the same rounded inputs: within a small multiple of bf16's unit roundoff, in the norm."""
    tensors = operands(T, H=4, HKV=2, K=16, V=16, dtype=torch.bfloat16)
    exact = run([x.double() for x in tensors], **options)
    for ours, true in zip(run(tensors, **options), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - true).norm()
        # A single visible key gives a gradient of zero in q and k: only rounding noise of the summands may remain.
        assert error <= 2**-7 * true.norm() + 1e-2 * (T == 1)


@pytest.mark.parametrize("T", [12, 13, 17])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("V", [8, 6])
def test_long_windowed_sequences_go_in_a_band_of_blocks(T, window, V, monkeypatch):
    monkeypatch.setattr(chunked, "BAND", 2)
    tensors = operands(T, V=V)
    ours = run_as("chunked", monkeypatch, tensors, window=window)
    assert_same(ours, run_as("reference", monkeypatch, tensors, window=window), 1e-10)


def test_fp32_at_production_block_sizes():
    tensors = operands(300, B=1, H=2, HKV=1, dtype=torch.float32)
    for options in (
        {},
        {"window": 70},
        {"cu_seqlens": offsets(130, 170)},
        {"cu_seqlens": offsets(290, 10), "window": 4},
    ):
        assert_same(run(tensors, **options), [x.float() for x in run([x.double() for x in tensors], **options)], 1e-5)


def test_autocast_changes_nothing():
    tensors = operands(dtype=torch.float32)
    plain = run(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(tensors), plain, 0.0)


def test_same_numbers_twice():
    tensors = operands(40, dtype=torch.bfloat16)
    for a, b in zip(run(tensors), run(tensors)):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}, {"window": 200}], ids=str)
@pytest.mark.parametrize("lengths", [None, (300, 1, 199), (250, 250)])
def test_gpu_is_the_definition(dtype, tolerance, options, lengths):
    tensors = operands(500, B=1, K=64, V=64, dtype=dtype)
    exact = run([x.double() for x in tensors], **options, cu_seqlens=lengths and offsets(*lengths))
    packing = {"cu_seqlens": offsets(*lengths).cuda()} if lengths else {}
    for ours, true in zip(run([x.cuda() for x in tensors], **options, **packing), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.cpu().double() - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"q": draw(2, 7, 4)}, {}, "q must have 4 dims"),
        ({"q": torch.ones(2, 7, 4, 8, dtype=torch.int64)}, {}, "q must be floating point"),
        ({"k": draw(2, 7, 2, 8, dtype=torch.float32)}, {}, "k is torch.float32"),
        ({"k": draw(2, 7, 2, 5)}, {}, "k .* must share the batch and head dim"),
        ({"v": draw(2, 6, 2, 6)}, {}, "v .* must share batch, time and heads"),
        ({"k": draw(2, 7, 3, 8), "v": draw(2, 7, 3, 8)}, {}, "k has 3 heads, which must divide the 4"),
        ({"k": draw(2, 6, 2, 8), "v": draw(2, 6, 2, 6)}, {}, "S >= T must hold"),
        ({}, {"window": 0}, "window must be at least 1"),
        ({}, {"window": 2, "causal": False}, "window needs causal=True"),
        ({}, {"cu_seqlens": offsets(7)}, "batch of 1"),
        ({}, {"cu_seqlens_k": offsets(7)}, "cu_seqlens_k needs cu_seqlens"),
    ],
)
def test_refusals_name_the_argument(change, options, message):
    tensors = dict(zip("qkv", operands())) | change
    with pytest.raises(ValueError, match=message):
        attention(*tensors.values(), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cu_seqlens": offsets(3, 3)}, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 7.0])}, "cu_seqlens must be an int32"),
        ({"cu_seqlens": offsets(3, 4), "cu_seqlens_k": offsets(3, 3)}, "cu_seqlens_k: "),
        ({"cu_seqlens": offsets(3, 4), "cu_seqlens_k": offsets(7)}, "cu_seqlens_k has 2 offsets"),
        ({"cu_seqlens": offsets(3, 4), "cu_seqlens_k": offsets(4, 3)}, "fewer keys than queries"),
    ],
)
def test_refusals_of_offsets(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*operands(7, B=1), **options)
    with pytest.raises(ValueError, match="cu_seqlens_k is needed"):
        attention(*operands(7, 8, B=1), cu_seqlens=offsets(7))
