"""The order of programs on devices of several dies, and the operators under it, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.architecture import assume
from kernels.common.tiles import die_order, die_order_rows, dies
from kernels.delta_rule import triton_call, triton_gradients, triton_scans
from kernels.delta_rule.triton import delta_rule_triton
from kernels.gated_linear_attention import triton_launch
from kernels.gated_linear_attention.triton import gated_linear_attention_triton

CPU = torch.device("cpu")


@triton.jit
def all_orders(out, programs, SIZE: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr):
    program = tl.arange(0, SIZE)
    tl.store(out + program, die_order(program, programs, GROUP, DIES), mask=program < programs)


@triton.jit
def rows_of_programs(out, GROUP: tl.constexpr, DIES: tl.constexpr):
    column, row = die_order_rows(GROUP, DIES)
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), row * tl.num_programs(0) + column)


def order(programs: int, group: int, count: int) -> list[int]:
    out = torch.full((1024,), -1, dtype=torch.int32)
    all_orders[(1,)](out, programs, SIZE=1024, GROUP=group, DIES=count)
    return out[:programs].tolist()


@pytest.mark.parametrize("group", [1, 2, 3, 16])
def test_the_order_is_a_permutation_of_any_grid(group):
    for programs in [*range(1, 50), 127, 128, 129, 304, 1000]:
        found = order(programs, group, 8)
        assert sorted(found) == list(range(programs)), programs
        # Program i runs on die i % 8. Whole groups of the permuted order stay on one die.
        die = {new: old % 8 for old, new in enumerate(found)}
        whole = programs // (8 * group) * (8 * group)
        for first in range(0, whole, group):
            assert len({die[first + member] for member in range(group)}) == 1, (programs, first)
        # The rest is one range a die.
        assert sorted(found[whole:]) == list(range(whole, programs))
        turns = [die[new] for new in range(whole, programs)] if group > 1 else []
        assert turns == sorted(turns), programs


def test_one_die_changes_nothing():
    assert order(37, 4, 1) == list(range(37))


@pytest.mark.parametrize("grid", [(1, 1), (6, 5), (4, 16), (16, 9)])
def test_two_dimensional_grids(grid):
    out = torch.full(grid, -1, dtype=torch.int32)
    rows_of_programs[grid](out, GROUP=2, DIES=8)
    found = out.flatten().tolist()
    assert found == order(grid[0] * grid[1], 2, 8)


def test_the_count_comes_from_the_architecture():
    assert dies(CPU) == 1
    with assume("gfx942"):
        assert dies(CPU) == 8
    with assume("sm90"):
        assert dies(CPU) == 1


def results(form, inputs, **options):
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    o, final = form(*leaves, output_final_state=True, **options)
    torch.manual_seed(1)
    wanted = [x for x in leaves if x is not None]
    return [o, final, *torch.autograd.grad([o, final], wanted, [torch.randn_like(o), torch.randn_like(final)])]


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("op", ["delta_rule", "gated_linear_attention"])
def test_operators_give_the_same_on_eight_dies(op, gate, monkeypatch):
    torch.manual_seed(0)
    B, T, H, HV, K, V = 1, 20, 3, 6, 32, 32
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, HV, V)
    g = -torch.rand((B, T, HV) if gate == "head" else (B, T, HV, K))
    small = {name: {"BV": 16} for name in ("delta_rule_scan_forward", "delta_rule_scan_backward")}
    small |= {"delta_rule_channel_gradients": {"BC": 16}}
    small |= {"gla_scan": {"BK": 16, "BV": 16, "SEGMENTS": 1}, "gla_output": {"BV": 16}}
    small |= {"gla_backward": {"BK": 16}, "gla_channel_backward": {"BK": 16}}
    if op == "delta_rule":
        form, inputs, options = delta_rule_triton, [q, k / 8, v, torch.rand(B, T, HV), g], {"scale": 0.2}
    else:
        form, inputs, options = gated_linear_attention_triton, [q, k, v, g], {"scale": 0.2}
    with tuning.override(small):
        plain = results(form, inputs, **options)
        for module in (triton_call, triton_scans, triton_gradients, triton_launch):
            monkeypatch.setattr(module, "dies", lambda device: 8)
        spread = results(form, inputs, **options)
    for a, b in zip(plain, spread):
        assert torch.equal(a, b)
        assert a.isfinite().all()
