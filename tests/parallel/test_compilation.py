"""Compiled blocks: the numbers of plain ones, programs shared by alike blocks and by all packings, and kept for later runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.compilation import apply_compile, is_compiled
from parallel.recompute import Recompute, apply_recompute
from pretrain.model.decoder import Decoder
from tests.pretrain.families import build
from tests.ranks import QUIET

LENGTH = 48


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def packings(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of 2, 1, 3, 4, ... sequences of random lengths."""
    generator = torch.Generator().manual_seed(0)
    for number in [2, 1, *range(3, count + 1)]:
        cuts = (torch.randperm(LENGTH - 1, generator=generator)[: number - 1] + 1).sort().values.tolist()
        yield (
            torch.randint(0, 256, (1, LENGTH), generator=generator),
            torch.tensor([0, *cuts, LENGTH], dtype=torch.int32),
        )


def step(model: Decoder, tokens: Tensor, borders: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    loss = model(tokens, targets=tokens.roll(-1, 1), cu_seqlens=borders)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counted(family: str, layers: int) -> list[int]:
    """Graphs made until after each of six packings, for a model of so many alike layers."""
    model, graphs, seen = build(family, repeat=layers // 2), Graphs(), []
    apply_compile(model.blocks, graphs)
    for row in packings(6):
        step(model, *row)
        seen.append(graphs.count)
    return seen


# Each kind of operator once, and one family in every run of the tests.
FAMILIES = ("mixer gated_delta_net", "ffn moe", "mixer attention", "mixer mamba2", "mixer cca", "Union of Experts")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAMILIES[:1] else pytest.mark.campaign) for name in FAMILIES]
)
def test_all_packings_share_their_programs(family: str) -> None:
    """Their number may grow until sequences have come in two numbers other than one: then that size is left open."""
    seen = counted(family, 2)
    assert seen[2:] == [seen[2]] * 4
    assert seen[2] < 30


def test_alike_blocks_share_their_programs() -> None:
    assert counted("mixer retnet", 4) == counted("mixer retnet", 2)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("mixer gated_delta_net", "full"),
        *(
            pytest.param(family, mode, marks=pytest.mark.campaign)
            for family in ("mixer gated_delta_net", "Qwen3-Next", "ZAYA1")
            for mode in ("none", "full", "selective")
        ),
    ],
)
def test_compiled_blocks_agree_and_keep_their_names(family: str, mode: Recompute) -> None:
    plain, compiled = build(family), build(family)
    apply_compile(compiled.blocks, "aot_eager")
    apply_recompute(compiled.blocks, mode)
    assert is_compiled(compiled) and not is_compiled(plain)
    for row in packings(2):
        (loss, gradients), (loss_compiled, gradients_compiled) = step(plain, *row), step(compiled, *row)
        torch.testing.assert_close(loss_compiled, loss, rtol=1e-6, atol=0)
        assert list(gradients) == list(gradients_compiled)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_recomputed_compiled_block_keeps_its_input_only() -> None:
    held = {}
    for mode in ("none", "full"):
        model = build("mixer retnet", repeat=3)
        apply_compile(model.blocks, Graphs())
        apply_recompute(model.blocks, mode)  # type: ignore[arg-type]
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(torch.zeros(2, LENGTH, dtype=torch.int64), targets=torch.zeros(2, LENGTH, dtype=torch.int64))
        held[mode] = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in own)
    assert held["full"] < 0.3 * held["none"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) * x


def compile_and_count(folder: Path) -> None:
    """What a process of its own does in the test below."""
    from parallel.compilation import Programs, keep_programs

    assert keep_programs(folder) == folder / "torch"
    block = Block()
    apply_compile([block])
    block(torch.ones(2, 8)).sum().backward()
    print(*Programs.so_far())


def test_a_second_process_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    code = "import sys, pathlib; from tests.parallel.test_compilation import compile_and_count as c; c(pathlib.Path(sys.argv[1]))"
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env={**_environment(), **QUIET}
        )
        assert run.returncode == 0, run.stderr
        found.append(tuple(int(number) for number in re.findall(r"\d+", run.stdout.splitlines()[-1])))
    # One graph, and two programs for it: forward and backward.
    assert found == [(1, 0, 2), (1, 2, 0)]
    assert any(tmp_path.rglob("*"))


def _environment() -> dict[str, str]:
    import os

    given = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHINDUCTOR_", "TRITON_CACHE"))}
    # Else the compiler first builds a program for each set of vector instructions, to see whether it runs: half of the time.
    return {**given, "TORCHINDUCTOR_VEC_ISA_OK": "0"}
