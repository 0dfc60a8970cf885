"""CCA's queries and keys: the definition against torch's convolutions, the fast form, gradients, states, memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.cca import FORMS, cca, cca_step, chunked, reference
from kernels.dispatch import Request, explain
from tests.kernels.cca_cases import Sizes, by_convolutions, draw, parameters, values_and_gradients

ZAYA = Sizes(4, 2, 6, 2, 2)
SIZES = {
    "ZAYA1": ZAYA,
    "long taps": Sizes(3, 1, 5, 4, 3),
    "one tap": Sizes(2, 2, 4, 1, 1),
    "first only": Sizes(2, 1, 3, 3, 1),
    "second only": Sizes(1, 1, 7, 1, 4),
}
EVERY = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
BORDERS = {
    "dense": None,
    "short ones": [0, 1, 3, 3, 4, 13, 21],
    "empty ends": [0, 0, 21, 21],
    "single tokens": [*range(6), 21],
}


@pytest.fixture(params=[None, 1, 5], ids=lambda n: "one block" if n is None else f"blocks of {n}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        size = lambda stream, wide: request.param  # noqa: E731
        monkeypatch.setattr(chunked, "_size", size)


@EVERY
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_the_definition_is_torchs_convolutions_padded_once(sizes: Sizes, borders: list[int] | None) -> None:
    z = draw(1 if borders else 3, 21, sizes.channels)
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    ours = reference.cca_reference(z, *parameters(sizes), cu_seqlens=cu_seqlens)
    for a, b in zip(ours, by_convolutions(z, parameters(sizes), sizes, borders), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@EVERY
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "continued"])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_fast_form_is_the_definition(sizes: Sizes, borders: list[int] | None, state: bool, block: None) -> None:
    z = draw(1 if borders else 3, 21 if borders else 7, sizes.channels)
    before = draw(len(borders) - 1 if borders else 3, sizes.reach, sizes.channels, seed=5) if state else None
    arguments = (z, parameters(sizes), before, borders)
    ours = values_and_gradients(chunked.cca_chunked, *arguments)
    exact = values_and_gradients(reference.cca_reference, *arguments)
    for name, value in exact.items():
        torch.testing.assert_close(
            ours[name], value, atol=1e-11, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradcheck() -> None:
    sizes = Sizes(2, 1, 3, 2, 2)
    leaves = [x.requires_grad_() for x in (draw(1, 6, 9), *parameters(sizes), draw(2, 2, 9, seed=3))]
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(*leaves: Any) -> Any:
        return cca(*leaves[:6], initial_state=leaves[6], output_final_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, leaves)


@EVERY
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2.5e-3)])
def test_low_precision_errs_by_its_roundings(sizes: Sizes, dtype: torch.dtype, tolerance: float) -> None:
    z, borders = draw(1, 64, sizes.channels, dtype=dtype), [0, 3, 40, 64]
    ours = values_and_gradients(cca, z, parameters(sizes, torch.float32), None, borders)
    given = [x.double() for x in parameters(sizes, torch.float32)]
    exact = values_and_gradients(reference.cca_reference, z.double(), given, None, borders)
    for name, value in exact.items():
        assert ours[name].dtype == (dtype if name in ("q", "k", "z") else torch.float32)
        assert (ours[name].double() - value).norm() < tolerance * value.norm(), name


@EVERY
@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 1, 3], [2, 5]], ids=str)
def test_a_state_continues_a_sequence_and_so_does_one_token(sizes: Sizes, cuts: list[int]) -> None:
    z, given = draw(2, 7, sizes.channels), parameters(sizes)
    whole = cca(z, *given, output_final_state=True)
    state, parts = None, []
    for piece in z.split(cuts, dim=1):
        if piece.shape[1] == 1 and state is not None:
            q, k, after = cca_step(piece[:, 0], *given, state)
            assert after is not state
            parts.append((q[:, None], k[:, None]))
            state = after
        else:
            q, k, state = cca(piece, *given, initial_state=state, output_final_state=True)
            parts.append((q, k))
    for joined, expected in zip([*map(torch.cat, zip(*parts), [1, 1]), state], whole, strict=True):
        torch.testing.assert_close(joined, expected, atol=1e-12, rtol=0)


def test_final_states_of_packed_sequences() -> None:
    """Of a sequence shorter than the state, what was before it counts; of an empty one it is all."""
    z, before = draw(1, 9, 36), draw(4, 4, 36, seed=1)
    sizes = Sizes(4, 2, 6, 4, 2)
    borders = torch.tensor([0, 1, 1, 7, 9], dtype=torch.int32)
    final = cca(z, *parameters(sizes), initial_state=before, output_final_state=True, cu_seqlens=borders)[2]
    expected = [
        torch.cat((before[0, 1:], z[0, :1])), before[1], z[0, 3:7], torch.cat((before[3, 2:], z[0, 7:9]))
    ]  # fmt: skip
    assert final is not None and torch.equal(final, torch.stack(expected))
    from_zero = cca(z, *parameters(sizes), output_final_state=True, cu_seqlens=borders)[2]
    assert from_zero is not None and torch.equal(from_zero[0], torch.cat((z.new_zeros(3, 36), z[0, :1])))


def test_lengths_are_one_and_the_factor() -> None:
    q, k, final = cca(draw(2, 9, 36), *parameters(ZAYA))
    assert final is None
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(2, 9, 4, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(k.norm(dim=-1), parameters(ZAYA)[-1].abs().expand(2, 9, 2), atol=1e-10, rtol=0)


def test_a_zero_vector_stays_zero_with_a_finite_gradient() -> None:
    given = [torch.zeros_like(x) for x in parameters(ZAYA)]
    results = values_and_gradients(cca, torch.zeros(1, 3, 36, dtype=torch.float64), given, eps=1e-6)
    assert not results["q"].any() and not results["k"].any()
    assert all(value.isfinite().all() for value in results.values())


def kept(call: Any, *known: torch.Tensor) -> int:
    """Bytes that the graph of `call` holds and that are not among the `known` tensors."""
    held = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(size for where, size in held.items() if where not in {x.untyped_storage().data_ptr() for x in known})


def test_nothing_is_kept_but_the_inputs() -> None:
    sizes = Sizes(8, 2, 16, 2, 2)
    leaves = [x.requires_grad_() for x in (draw(1, 50, 160, dtype=torch.float32), *parameters(sizes, torch.float32))]
    assert kept(lambda: cca(*leaves), *leaves) == 0
    # Plain autograd keeps windows, means and what is normalised.
    assert kept(lambda: reference.cca_reference(*leaves), *leaves) > 3 * leaves[0].nbytes


def test_slices_of_a_wider_projection() -> None:
    wide = draw(2, 9, 60)
    ours = values_and_gradients(lambda z, *rest, **more: cca(z[..., 12:48], *rest, **more), wide, parameters(ZAYA))
    exact = values_and_gradients(cca, wide[..., 12:48].contiguous(), parameters(ZAYA))
    assert torch.equal(ours["q"], exact["q"]) and torch.equal(ours["z"][..., 12:48], exact["z"])
    assert not ours["z"][..., :12].any() and not ours["z"][..., 48:].any()


def test_no_tokens() -> None:
    before = draw(2, 2, 36)
    results = values_and_gradients(cca, draw(2, 0, 36), parameters(ZAYA), before)
    assert results["q"].shape == (2, 0, 4, 6) and not results["grouped"].any()
    final = cca(draw(2, 0, 36), *parameters(ZAYA), initial_state=before, output_final_state=True)[2]
    assert final is not None and torch.equal(final, before)


def test_autocast_changes_nothing_and_forms_are_ordered() -> None:
    z, given = draw(1, 5, 36, dtype=torch.float32), parameters(ZAYA, torch.float32)
    plain = cca(z, *given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = cca(z, *given)
    assert torch.equal(plain[0], under[0]) and torch.equal(plain[1], under[1])
    request = Request("cca", torch.device("cuda"), torch.bfloat16, {"B": 1, "T": 5, "H": 4, "HKV": 2, "d": 128})
    assert explain(FORMS, request)[0] == ("triton", "chosen")
    wide = Request("cca", torch.device("cuda"), torch.bfloat16, {"B": 1, "T": 5, "H": 4, "HKV": 2, "d": 320})
    assert explain(FORMS, wide)[:2] == [
        ("triton", "d = 320: the Triton form holds heads of at most 256 channels"), ("chunked", "chosen")
    ]  # fmt: skip


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"z": torch.zeros(1, 3, 36, dtype=torch.int64)}, "z must be floating point"),
    ({"depthwise": torch.zeros(35, 2)}, r"depthwise must be \[C, W0\] with C=36"),
    ({"depthwise_bias": torch.zeros(35)}, r"depthwise_bias must be \[C\] with C=36"),
    ({"grouped": torch.zeros(5, 12, 6)}, "grouped must be"),
    ({"grouped": torch.zeros(6, 13, 6)}, "not a multiple of its d = 6"),
    ({"grouped_bias": torch.zeros(36, 1)}, "grouped_bias must be"),
    ({"factor": torch.zeros(4)}, r"factor must be \[HKV\].*J = 6"),
    ({"initial_state": torch.zeros(1, 3, 36)}, r"initial_state must be \[N, W0 \+ W1 - 2, C\] = \(1, 2, 36\)"),
    ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens must rise from 0 to the number of tokens 3"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_refusals_name_the_argument(change: dict[str, Any], message: str) -> None:
    names = ("z", "depthwise", "depthwise_bias", "grouped", "grouped_bias", "factor")
    given = dict(zip(names, (torch.zeros(1, 3, 36), *parameters(ZAYA, torch.float32))))
    with pytest.raises(ValueError, match=message):
        cca(**(given | change))


def test_a_state_that_does_not_fit_one_token() -> None:
    with pytest.raises(ValueError, match=r"state must be \[B, W0 \+ W1 - 2, C\] = \(2, 2, 36\)"):
        cca_step(draw(2, 36), *parameters(ZAYA), draw(2, 1, 36))
