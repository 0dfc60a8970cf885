"""Routed experts: the fast form against the definition, empty and crowded experts, precision, refusals."""

import pytest
import torch

from kernels.common import rows
from kernels.experts import chunked, experts, load
from kernels.experts.activations import ACTIVATIONS


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(N=11, D=6, E=5, F=4, k=2, dtype=torch.float64, weights=None, scores=None):
    """(x, gate_up, down, scores), and indices of k different experts a token."""
    weights, scores = weights or dtype, scores or dtype
    generator = torch.Generator().manual_seed(9)
    indices = torch.rand(N, E, generator=generator).topk(k, dim=-1).indices
    tensors = (
        draw(N, D, dtype=dtype),
        draw(E, D, 2 * F, dtype=weights, seed=1) * D**-0.5,
        draw(E, F, D, dtype=weights, seed=2) * F**-0.5,
        draw(N, k, dtype=scores, seed=3),
    )
    return tensors, indices


def run(tensors, indices, **options):
    """[y, dx, d_gate_up, d_down, d_scores] for a fixed upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = experts(*leaves[:3], indices, leaves[3], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, dtype=y.dtype, seed=4))]


def run_as(form, monkeypatch, *arguments, **options):
    monkeypatch.setenv("BRAID_KERNELS", form)
    result = run(*arguments, **options)
    monkeypatch.delenv("BRAID_KERNELS")
    return result


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fast_form_is_the_definition(dtype, tolerance, k, activation, monkeypatch):
    tensors, indices = operands(k=k, dtype=dtype)
    ours = run_as("chunked", monkeypatch, tensors, indices, activation=activation)
    assert_same(ours, run_as("reference", monkeypatch, tensors, indices, activation=activation), tolerance)


@pytest.mark.parametrize("align", [3, 8])
def test_rounding_up_each_share_changes_nothing(align, monkeypatch):
    """Filling rows have weight zero: they add nothing to y or to any gradient."""
    tensors, indices = operands(N=13, k=2)
    expected = run_as("reference", monkeypatch, tensors, indices, activation="silu")
    monkeypatch.setattr(chunked, "alignment", lambda x: align)
    assert_same(run_as("chunked", monkeypatch, tensors, indices, activation="silu"), expected, 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_shares_of_several_blocks(gated, activation, monkeypatch):
    """Blocks of two rows of hidden width 4: experts with whole blocks, a last short one, and less than one."""
    (x, gate_up, down, scores), _ = operands(k=1)
    tensors = (x, gate_up if gated else gate_up[..., :4].contiguous(), down, scores)
    indices = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 4])[:, None]
    expected = run_as("reference", monkeypatch, tensors, indices, activation=activation)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 8 * x.element_size() // torch.get_num_threads())
    assert_same(run_as("chunked", monkeypatch, tensors, indices, activation=activation), expected, 1e-10)


ROUTINGS = {
    "all to the last": lambda shape: torch.full(shape, 4),
    "all to the first": lambda shape: torch.zeros(shape, dtype=torch.int64),
    "first and last empty": lambda shape: torch.arange(shape[0] * shape[1]).view(shape) % 3 + 1,
    "one expert twice for each token": lambda shape: torch.arange(shape[0])[:, None].expand(shape) % 5,
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_empty_and_crowded_experts(routing, monkeypatch):
    tensors, indices = operands()
    indices = ROUTINGS[routing](indices.shape)
    ours = run_as("chunked", monkeypatch, tensors, indices)
    assert_same(ours, run_as("reference", monkeypatch, tensors, indices), 1e-10)
    empty = load(indices, 5) == 0
    for gradient in ours[2:4]:
        assert torch.equal(gradient[empty], torch.zeros_like(gradient[empty]))
        assert (gradient[~empty].abs().amax(dim=(1, 2)) > 0).all()


def test_no_tokens():
    tensors, indices = operands(N=0)
    y, *gradients = run(tensors, indices)
    assert y.shape == (0, 6)
    assert all(not gradient.any() for gradient in gradients)


def test_one_expert_is_a_plain_gated_feed_forward():
    (x, gate_up, down, scores), indices = operands(E=1, k=1)
    gate, up = (x @ gate_up[0]).chunk(2, dim=-1)
    expected = scores * ((gate * torch.sigmoid(gate) * up) @ down[0])
    torch.testing.assert_close(experts(x, gate_up, down, indices, scores), expected, atol=1e-12, rtol=0)


def test_order_of_choices_and_tokens_does_not_matter():
    (x, gate_up, down, scores), indices = operands()
    y = experts(x, gate_up, down, indices, scores)
    torch.testing.assert_close(experts(x, gate_up, down, indices.flip(1), scores.flip(1)), y, atol=1e-12, rtol=0)
    flipped = experts(x.flip(0), gate_up, down, indices.flip(0), scores.flip(0))
    torch.testing.assert_close(flipped.flip(0), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors, indices = operands(N=4, D=3, E=3, F=2)
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda x, g, d, s: experts(x, g, d, indices, s, activation=activation), tensors)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_bf16_tokens_with_fp32_parameters(k):
    """Dtypes as mixed-precision training has them; errors against fp64 on the same inputs are those of rounding."""
    tensors, indices = operands(64, 32, 4, 16, k=k, dtype=torch.bfloat16, weights=torch.float32, scores=torch.float32)
    ours = run(tensors, indices)
    exact = run([x.double() for x in tensors], indices)
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for gradient, true, dtype in zip(ours, exact, dtypes, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - true).norm() <= 2**-6.5 * true.norm()


def test_autocast_changes_nothing():
    tensors, indices = operands(dtype=torch.float32)
    plain = run(tensors, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(tensors, indices), plain, 0.0)


def test_same_numbers_twice():
    tensors, indices = operands(64, 32, 4, 16, dtype=torch.bfloat16, weights=torch.float32, scores=torch.float32)
    for a, b in zip(run(tensors, indices), run(tensors, indices)):
        assert torch.equal(a, b)


def test_noncontiguous_operands():
    (x, gate_up, down, scores), indices = operands()
    views = [x.T.contiguous().T, gate_up.mT.contiguous().mT, down.mT.contiguous().mT, scores.T.contiguous().T]
    assert_same(run(views, indices.T.contiguous().T), run((x, gate_up, down, scores), indices), 1e-12)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_operands_get_no_gradient(frozen):
    tensors, indices = operands()
    whole = run(tensors, indices)
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
    y = experts(*leaves[:3], indices, leaves[3])
    y.backward(draw(*y.shape, seed=4))
    assert leaves[frozen].grad is None
    for i in set(range(4)) - {frozen}:
        assert torch.equal(leaves[i].grad, whole[1 + i])


def test_load_counts_choices():
    counts = load(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [2, 1, 0, 3, 0]
    assert load(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": draw(2, 3, 6)}, "x must be floating point"),
        ({"gate_up": draw(5, 6, 7)}, "gate_up must be"),
        ({"down": draw(5, 4, 7)}, "down must be"),
        ({"indices": torch.zeros(11, 2, dtype=torch.int32)}, "indices must be int64"),
        ({"indices": torch.zeros(10, 2, dtype=torch.int64)}, "indices must be int64 .* N = 11"),
        ({"indices": torch.full((11, 2), 5)}, r"indices must lie in 0..4 .* got 5"),
        ({"indices": torch.full((11, 2), -1)}, r"indices must lie in 0..4 .* got -1"),
        ({"scores": draw(11, 3)}, "scores must be"),
        ({"activation": "swish"}, "activation='swish' is unknown; choose one of silu"),
    ],
)
def test_refusals_name_the_argument(change, message):
    (x, gate_up, down, scores), indices = operands()
    arguments = {"x": x, "gate_up": gate_up, "down": down, "indices": indices, "scores": scores} | change
    with pytest.raises(ValueError, match=message):
        experts(**arguments)


def test_shares_are_rounded_where_a_new_shape_costs_a_kernel(monkeypatch):
    x = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    for library, of_fp32 in (("blas", 1), ("onednn", 64)):
        monkeypatch.setattr(chunked.products, "in_use", lambda library=library: library)
        assert [chunked.alignment(x[dtype]) for dtype in x] == [1, of_fp32, 64]


def test_loads_that_change_a_little_take_memory_of_the_same_size():
    taken = [chunked._room(torch.zeros(1), rows, 3) for rows in (0, 1, 31, 8250, 8600, 8704, 8705)]
    assert [x.shape for x in taken] == [(rows, 3) for rows in (0, 1, 31, 8250, 8600, 8704, 8705)]
    assert [x.untyped_storage().nbytes() // 12 for x in taken] == [0, 1, 31, 8704, 8704, 8704, 9216]
