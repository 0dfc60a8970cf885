"""The head's loss: the fast form against the definition, ignored tokens, chunks, z-loss, smoothing, precision, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from kernels.benching.memory import peak_bytes
from kernels.cross_entropy import Shard, chunked, linear_cross_entropy, logits
from pretrain.estimate.memory import Memory

IGNORED = -100


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(N=11, D=6, V=13, dtype=torch.float64, weights=None, bias=True):
    tensors = [draw(N, D, dtype=dtype), draw(V, D, dtype=weights or dtype, seed=1)]
    if bias:
        tensors.append(draw(V, dtype=weights or dtype, seed=2))
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    targets[::4] = IGNORED
    return tensors, targets


def run(tensors, targets, **options):
    """[loss, dx, d_weight, d_bias] for a fixed upstream gradient that is not one."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2] if len(leaves) > 2 else None, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, draw(*loss.shape, dtype=loss.dtype, seed=4))]


def run_as(form, monkeypatch, *arguments, **options):
    monkeypatch.setenv("BRAID_KERNELS", form)
    result = run(*arguments, **options)
    monkeypatch.delenv("BRAID_KERNELS")
    return result


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[None, 30], ids=["one block", "two rows a block"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(logits, "BLOCK_LOGITS", request.param)


REDUCTIONS = ("sum", "mean", "none")
TERMS = [
    {"z_loss": z, "label_smoothing": smooth, "bias": bias}
    for z, smooth, bias in itertools.product((0.0, 0.1), (0.0, 0.2), (False, True))
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("chunk", [None, 4])
def test_fast_form_is_the_definition(dtype, tolerance, reduction, terms, chunk, block, monkeypatch):
    tensors, targets = operands(dtype=dtype, bias=terms["bias"])
    options = {key: value for key, value in terms.items() if key != "bias"} | {"reduction": reduction, "chunk": chunk}
    ours = run_as("chunked", monkeypatch, tensors, targets, **options)
    assert_same(ours, run_as("reference", monkeypatch, tensors, targets, **options), tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_torch_computes_the_same(reduction, smooth):
    (x, weight), targets = operands(bias=False)
    ours = linear_cross_entropy(x, weight, targets, reduction=reduction, label_smoothing=smooth)
    theirs = F.cross_entropy(x @ weight.T, targets, reduction=reduction, label_smoothing=smooth)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_z_loss_by_hand():
    """All logits zero over 8 entries: the log of the partition function is log 8, whatever the target."""
    log8 = torch.tensor(8.0, dtype=torch.float64).log()
    x, weight = torch.zeros(3, 2, dtype=torch.float64), draw(8, 2)
    targets = torch.tensor([0, 5, IGNORED])
    for reduction, tokens in (("sum", 2), ("mean", 1)):
        loss = linear_cross_entropy(x, weight, targets, z_loss=0.5, reduction=reduction)
        torch.testing.assert_close(loss, tokens * (log8 + 0.5 * log8**2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_tokens_ignored(form, reduction, monkeypatch):
    tensors, targets = operands()
    results = run_as(form, monkeypatch, tensors, torch.full_like(targets, IGNORED), reduction=reduction, z_loss=0.1)
    for x in results:
        assert torch.equal(x, torch.zeros_like(x))


def test_mean_is_over_the_tokens_kept():
    (x, weight), targets = operands(bias=False)
    for kept in (1, 2, 8):
        some = torch.cat([targets[targets != IGNORED][:kept], torch.full((11 - kept,), IGNORED)])
        mean, total = (linear_cross_entropy(x, weight, some, reduction=r) for r in ("mean", "sum"))
        torch.testing.assert_close(mean * kept, total, atol=1e-12, rtol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(reduction):
    loss, dx, *others = run(*operands(N=0), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert dx.shape == (0, 6)
    assert not loss.any()
    assert not any(x.any() for x in others)


def test_ignore_index_inside_the_vocabulary():
    (x, weight), targets = operands(bias=False)
    targets = targets.clamp(min=0)
    losses = linear_cross_entropy(x, weight, targets, ignore_index=0, reduction="none")
    assert torch.equal(losses == 0, targets == 0)


def test_extreme_logits_stay_finite(monkeypatch):
    """A target whose probability underflows, and one that is certain."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.tensor([[1000.0], [0.0], [-1000.0]], dtype=dtype)
        x, targets = torch.ones(3, 1, dtype=dtype), torch.tensor([0, 1, 2])
        loss, dx, _ = run((x, weight), targets, reduction="none")
        assert loss.tolist() == [0.0, 1000.0, 2000.0]
        assert torch.isfinite(dx).all()


def test_gradcheck():
    (x, weight, bias), targets = operands(N=5, D=3, V=4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1, "chunk": 2}
        assert torch.autograd.gradcheck(
            lambda x, w, b, o=options: linear_cross_entropy(x, w, targets, bias=b, **o), leaves
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("terms", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1}], ids=str)
def test_bf16_hidden_states_with_fp32_parameters(reduction, terms):
    """Dtypes as mixed-precision training has them; errors against fp64 on the same inputs are those of rounding."""
    tensors, targets = operands(200, 32, 301, dtype=torch.bfloat16, weights=torch.float32, bias=False)
    tensors[1] *= 32**-0.5
    options = {"reduction": reduction, "chunk": 64, **terms}
    ours = run(tensors, targets, **options)
    exact = run([tensors[0].double(), tensors[1].double()], targets, **options)
    for x, true, dtype in zip(ours, exact, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        assert x.dtype == dtype
        assert (x.double() - true).norm() <= 2**-7 * true.norm()
    # The loss itself carries fp32 sums of bf16 logits: far finer than bf16.
    assert (ours[0].double() - exact[0]).norm() <= 2**-10 * exact[0].norm()


def test_parameters_in_bf16_get_gradients_in_bf16():
    tensors, targets = operands(40, dtype=torch.bfloat16)
    loss, *gradients = run(tensors, targets)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_changes_nothing(reduction):
    tensors, targets = operands(dtype=torch.float32)
    plain = run(tensors, targets, reduction=reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(tensors, targets, reduction=reduction), plain, 0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_operands_get_no_gradient(reduction, frozen):
    tensors, targets = operands()
    whole = run(tensors, targets, reduction=reduction)
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
    loss.backward(draw(*loss.shape, seed=4))
    assert leaves[frozen].grad is None
    for i in set(range(3)) - {frozen}:
        assert torch.equal(leaves[i].grad, whole[1 + i])


def test_backward_twice_through_a_retained_graph():
    (x, weight), targets = operands(bias=False)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(4.0, dtype=torch.float64))
    for a, b in zip(first, second):
        torch.testing.assert_close(2 * a, b, atol=1e-12, rtol=0)


def test_no_grad_gives_the_loss_alone():
    tensors, targets = operands(bias=False)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.no_grad():
        loss = linear_cross_entropy(*leaves, targets)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(*leaves, targets).detach())


def test_default_chunk_is_even_and_bounded():
    assert chunked.default_chunk(4096, 4096) == 1024
    assert chunked.default_chunk(1100, 4096) == 550
    assert chunked.default_chunk(4096, 256_000) == 256
    assert chunked.default_chunk(5, 4096) == 5
    assert chunked.default_chunk(0, 4096) == 1


def of_parts(parts, tensors, targets, **options):
    """What ranks with `parts` of the vocabulary compute, one by one: first each rank's numbers are kept, then gathered."""
    V, first, kept = tensors[1].shape[0], 0, []
    shares = []
    for rows in parts:
        shares.append((first, [tensors[0], *(t[first : first + rows] for t in tensors[1:])]))
        first += rows

    def keep(numbers):
        kept.append(numbers.clone())
        return numbers

    for first, share in shares:
        with torch.no_grad():
            bias = share[2] if len(share) > 2 else None
            shard = Shard(first, V, keep)
            linear_cross_entropy(*share[:2], targets, bias=bias, shard=shard, **{**options, "reduction": "none"})
    chunks = len(kept) // len(parts)
    results = []
    for first, share in shares:
        turn = itertools.count()

        def gather(numbers, turn=turn):
            i = next(turn) % chunks
            return torch.cat([kept[i + rank * chunks] for rank in range(len(parts))])

        results.append(run(share, targets, shard=Shard(first, V, gather), **options))
    return results


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("terms", TERMS[::7], ids=str)
def test_parts_of_a_vocabulary_are_the_whole(dtype, tolerance, reduction, terms, block):
    tensors, targets = operands(dtype=dtype, bias=terms["bias"])
    options = {key: value for key, value in terms.items() if key != "bias"} | {"reduction": reduction, "chunk": 4}
    loss, dx, *parameters = run(tensors, targets, **options)
    results = of_parts((4, 1, 8), tensors, targets, **options)
    for result in results:
        assert_same(result[:1], [loss], tolerance)
    assert_same([sum(result[1] for result in results)], [dx], tolerance)
    for i, whole in enumerate(parameters):
        assert_same([torch.cat([result[2 + i] for result in results])], [whole], tolerance)


def test_parts_in_bf16_and_targets_of_the_whole():
    tensors, targets = operands(40, 16, 30, dtype=torch.bfloat16, weights=torch.float32, bias=False)
    exact = run([t.double() for t in tensors], targets, reduction="sum")
    results = of_parts((10, 20), tensors, targets, reduction="sum")
    found = [results[0][0], results[0][1].double() + results[1][1], torch.cat([r[2] for r in results])]
    for x, true in zip(found, exact, strict=True):
        assert (x.double() - true).norm() <= 2**-7 * true.norm()
    shard = Shard(0, 13, lambda numbers: numbers)
    with pytest.raises(ValueError, match=r"targets\[2\] = 13 is neither a row of weight \(0..12"):
        linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([12, 0, 13]), shard=shard)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_large_vocabulary_takes_a_fifth_of_the_memory(half, monkeypatch):
    """At V = 262144, N = 4096 and D = 1024: every allocation counted, on tensors without memory.

    Blocks are larger than a CPU takes them, to save time: that only adds to our side.
    """
    monkeypatch.setattr(logits, "BLOCK_LOGITS", 1 << 26)
    monkeypatch.setattr(chunked, "SLICE_CPU", 1 << 24)
    monkeypatch.setattr("kernels.cross_entropy._check_targets", lambda *_: None)  # there are no values to look at

    def all_logits(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets)

    peaks = []
    for function in (linear_cross_entropy, all_logits):
        with FakeTensorMode():
            x = torch.empty(4096, 1024, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
            weight = torch.empty(262144, 1024, requires_grad=True)
            targets = torch.empty(4096, dtype=torch.int64)
            with Memory() as memory:
                torch.autograd.grad(function(x, weight, targets), (x, weight))
        peaks.append(memory.peak)
    assert peaks[0] <= peaks[1] / 5
    assert peaks[0] >= 4 * 262144 * 1024  # the weight's gradient at least: something was counted


def test_the_peak_is_the_gradients_and_one_chunk_of_logits():
    """Counted on real tensors: the backward scales in place, and hands on the one copy there is."""
    N, D, V = 64, 256, 8192
    x, weight = draw(N, D, dtype=torch.float32).requires_grad_(), draw(V, D, dtype=torch.float32).requires_grad_()
    targets = torch.arange(N)

    def step():
        x.grad = weight.grad = None
        (linear_cross_entropy(x, weight, targets, reduction="sum", chunk=16) * 0.5).backward()

    peak = peak_bytes(step, torch.device("cpu"))
    least = 4 * (V * D + 16 * V)
    assert least <= peak <= least + 4 * N * D + 4 * 16 * V // 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": draw(2, 3, 6)}, "x must be floating point"),
        ({"weight": draw(13, 5)}, "weight must be"),
        ({"targets": torch.zeros(10, dtype=torch.int64)}, r"targets must be int64 \[11\]"),
        ({"targets": torch.zeros(11, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.tensor([0] * 7 + [13, -5, 0, 0])}, r"targets\[7\] = 13 is neither"),
        ({"targets": torch.tensor([-100, -1] + [0] * 9)}, r"targets\[1\] = -1 is neither"),
        ({"bias": draw(12)}, "bias must be"),
        ({"reduction": "avg"}, "reduction='avg' is unknown"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"z_loss": -0.1}, "z_loss must not be negative"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_refusals_name_the_argument(change, message):
    (x, weight), targets = operands(bias=False)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"x": x, "weight": weight, "targets": targets} | change))
