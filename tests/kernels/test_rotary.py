"""Rotary positions: the fast form against the definition, both pairings, partial, packed, gradients, refusals."""

import math

import pytest
import torch

from kernels.dispatch import Request, explain
from kernels.rotary import FORMS, chunked, reference, rotary
from tests.kernels.row_cases import assert_same, blocks, draw, value_and_gradient

block = blocks(chunked, "BLOCK_ELEMENTS", 16)


def tables(positions, channels, dtype=torch.float64):
    """(cos, sin) [*positions, channels / 2] at a base of 100."""
    angles = positions[..., None].double() * 100.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    "shape, channels", [((2, 5, 3, 8), 8), ((1, 7, 1, 6), 4), ((3, 1, 2, 5), 2), ((2, 0, 3, 4), 4)]
)
def test_fast_form_is_the_definition(shape, channels, gathered, interleaved, dtype, tolerance, block):
    wide = dtype if dtype == torch.float64 else torch.float32
    positions = torch.randint(0, 9, shape[:2], generator=torch.Generator().manual_seed(2))
    if gathered:
        cos, sin = tables(torch.arange(9), channels, wide)
    else:
        cos, sin = (t[:, :, None] for t in tables(positions, channels, wide))
        positions = None
    x = draw(*shape, dtype=dtype)
    ours = value_and_gradient(lambda t: chunked.rotary_chunked(t, cos, sin, positions, interleaved), x)
    theirs = value_and_gradient(lambda t: reference.rotary_reference(t, cos, sin, positions, interleaved), x)
    assert ours[0].dtype == dtype
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize("interleaved, pair", [(False, (1, 3)), (True, (2, 3))])
def test_a_quarter_turn_by_hand(interleaved, pair):
    """Of two pairs in four channels the second is turned by 90 degrees: (a, b) becomes (-b, a); a fifth channel stays."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    angles = torch.tensor([0.0, math.pi / 2]).view(1, 1, 1, 2)
    y = rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    wanted = x.clone()
    wanted[..., pair[0]], wanted[..., pair[1]] = -x[..., pair[1]], x[..., pair[0]]
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distances_only_and_pairings_are_permutations(interleaved):
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=3)

    def score(m, n):
        a, b = (
            rotary(x, *tables(torch.arange(20), 8), positions=torch.tensor([[p]]), interleaved=interleaved)
            for x, p in ((q, m), (k, n))
        )
        return (a * b).sum()

    torch.testing.assert_close(score(3, 5), score(15, 17), atol=1e-12, rtol=0)
    assert abs(score(3, 5) - score(3, 6)) > 1e-3
    order = torch.arange(8).view(4, 2).T.flatten()  # the first of all pairs, then the second
    cos, sin = tables(torch.arange(6)[None, :, None], 8)
    x = draw(1, 6, 2, 8)
    halves, pairs = rotary(x[..., order], cos, sin), rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(halves, pairs[..., order], atol=1e-14, rtol=0)


def test_packed_positions_start_again():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    cos, sin = tables(torch.arange(4), 4)
    x = draw(1, 6, 2, 6)
    packed = rotary(x, cos, sin, positions=positions)
    for a, b in ((0, 3), (3, 5), (5, 6)):
        alone = rotary(x[:, a:b], cos, sin, positions=torch.arange(b - a)[None])
        assert torch.equal(packed[:, a:b], alone)
    assert torch.equal(packed[..., 4:], x[..., 4:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_and_one_row_of_positions_for_a_batch(interleaved, block):
    cos, sin = tables(torch.arange(3)[None, :, None], 4)
    x = draw(2, 3, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos, sin, interleaved=interleaved), x)
    whole = rotary(x, cos.expand(2, -1, -1, -1), sin.expand(2, -1, -1, -1), interleaved=interleaved)
    assert torch.equal(rotary(x, cos, sin, interleaved=interleaved), whole)


@pytest.mark.parametrize("interleaved", [False, True])
def test_slices_of_a_projection_and_nothing_of_x_is_kept(interleaved):
    mixed = draw(2, 4, 30, dtype=torch.float32)
    x = mixed[..., 6:18].unflatten(-1, (2, 6)).requires_grad_()
    cos, sin = (t.float() for t in tables(torch.arange(4)[None, :, None], 4))
    y = rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(y, rotary(x.detach().contiguous(), cos, sin, interleaved=interleaved))
    assert sum(t.numel() for t in y.grad_fn.saved_tensors) == 2 * 2 * 4 * 2  # cos and sin, for B T tokens


def test_bf16_rounds_once():
    x = draw(2, 16, 3, 8, dtype=torch.bfloat16)
    cos, sin = tables(torch.arange(16)[None, :, None], 8, torch.float32)
    for interleaved in (False, True):
        y = rotary(x, cos, sin, interleaved=interleaved)
        exact = reference.rotary_reference(x.double(), cos.double(), sin.double(), None, interleaved)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_autocast_changes_nothing_and_forms_are_ordered():
    x = draw(1, 3, 2, 4, dtype=torch.float32)
    cos, sin = tables(torch.arange(3)[None, :, None], 4, torch.float32)
    plain = rotary(x, cos, sin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotary(x, cos, sin), plain)
    request = Request("rotary", torch.device("cuda"), torch.bfloat16, {})
    assert explain(FORMS, request)[0] == ("triton", "chosen")


X, COS = torch.zeros(2, 3, 1, 4), torch.ones(2, 3, 1, 2)
TABLE = torch.ones(5, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X[0], COS, COS, None), r"x must be floating point \[B, T, H, K\]"),
        ((X, COS[:, :2], COS, None), r"cos must be \[2 or 1, 3, 1, R / 2\]"),
        ((X, COS, COS, torch.zeros(2, 3, dtype=torch.int64)), r"cos must be \[S, R / 2\]"),
        ((X, COS.repeat(1, 1, 1, 2), COS, None), "cos has 4 angles for 8 channels"),
        ((X, COS, COS[:1], None), "sin must be"),
        ((X, COS.bfloat16(), COS.bfloat16(), None), "must be float32 or float64"),
        ((X, TABLE, TABLE, torch.zeros(2, 3, dtype=torch.int32)), "positions must be int64"),
        ((X, TABLE, TABLE, torch.full((2, 3), 5)), "positions reach 5, but cos has rows 0..4"),
        ((X, TABLE, TABLE, torch.full((2, 3), -1)), "positions reach -1"),
    ],
)
def test_refusals_name_the_argument(arguments, message):
    x, cos, sin, positions = arguments
    with pytest.raises(ValueError, match=message):
        rotary(x, cos, sin, positions=positions)
