"""Threads, cores and memory of ranks on CPUs: in processes of their own, since all of it stays with a process."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.common import products
from parallel.cores import members
from pretrain.host import CpuConfig, keep_memory, nodes, settle, share
from tests.pretrain.train.small_run import train_on_rank
from tests.ranks import TRAINING, run_ranks

TWO = [[0, 1, 2, 3], [4, 5, 6, 7]]
ALL = list(range(8))


def test_sets_of_cores_as_linux_writes_them(tmp_path: Path) -> None:
    assert sorted(members("0-2,8")) == [0, 1, 2, 8]
    assert sorted(members("")) == []
    for index, text in ((0, "0-3"), (1, ""), (10, "6"), (2, "4,5")):
        (tmp_path / f"node{index}").mkdir()
        (tmp_path / f"node{index}" / "cpulist").write_text(text + "\n")
    assert nodes(tmp_path) == [[0, 1, 2, 3], [4, 5], [6]]  # node 1 is memory without cores
    assert nodes(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("bind", "cores", "nodes", "world", "expected"),
    [
        ("numa", ALL, TWO, 4, [TWO[0], TWO[0], TWO[1], TWO[1]]),
        ("numa", ALL, TWO, 1, [ALL]),  # one rank has them all
        ("numa", ALL, TWO, 3, [ALL, ALL, ALL]),  # no even share of two nodes
        ("numa", ALL, [ALL], 2, [ALL, ALL]),
        ("numa", [2, 3, 4, 5], TWO, 2, [[2, 3], [4, 5]]),  # what the scheduler gave, by node
        ("numa", [0, 1], TWO, 2, [[0, 1], [0, 1]]),
        ("cores", ALL, TWO, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("cores", ALL, [[0, 2, 4, 6], [1, 3, 5, 7]], 4, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("cores", ALL, [], 3, [[0, 1], [2, 3], [4, 5]]),
        ("cores", [0, 1], [], 4, [[0, 1]] * 4),  # fewer cores than ranks
        ("none", ALL, TWO, 4, [ALL] * 4),
    ],
)
def test_shares_of_the_cores(
    bind: str, cores: list[int], nodes: list[list[int]], world: int, expected: list[list[int]]
) -> None:
    assert [share(bind, cores, nodes, rank, world) for rank in range(world)] == expected


def _settled(rank: int, world: int, fields: dict[str, Any], variables: dict[str, str | None], local_world: int) -> Any:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    notes = settle(CpuConfig(**fields), rank, local_world)
    return torch.get_num_threads(), sorted(os.sched_getaffinity(0)), notes


def test_threads_are_a_fair_share_of_the_cores_unless_somebody_said_otherwise() -> None:
    cores = len(os.sched_getaffinity(0))

    def threads(fields: dict[str, Any], variables: dict[str, str | None], local_world: int) -> int:
        return int(run_ranks(_settled, 1, fields, variables, local_world)[0][0])

    assert threads({}, {"OMP_NUM_THREADS": None}, 1) == cores
    assert threads({}, {"OMP_NUM_THREADS": None}, 2 * cores) == 1
    assert threads({}, {"OMP_NUM_THREADS": "1"}, 1) == 1
    assert threads({"threads": 3}, {"OMP_NUM_THREADS": "1"}, 1) == 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
def test_idle_cores_under_torchrun_are_named() -> None:
    cores = len(os.sched_getaffinity(0))
    ((_, _, notes),) = run_ranks(_settled, 1, {}, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1)
    assert len(notes) == 1 and f"cpu.threads={cores}" in notes[0]
    assert run_ranks(_settled, 1, {}, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, cores)[0][2] == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
def test_ranks_bound_to_cores_have_none_in_common() -> None:
    (_, first, notes), (_, second, _) = run_ranks(_settled, 2, {"bind": "cores"}, {}, 2)
    assert notes == []
    assert len(first) == len(second) == len(os.sched_getaffinity(0)) // 2 and not set(first) & set(second)
    (notes, _) = [notes for _, _, notes in run_ranks(_settled, 2, {"bind": "cores", "threads": 64}, {}, 2)]
    assert notes == [f"64 threads share {len(first)} core(s): cpu.threads={len(first)} is faster"]


def _pages(rank: int, world: int, keep: bool, variables: dict[str, str]) -> tuple[bool, int]:
    """(kept, pages that the system had to find for eight results of 8 MiB, made and freed five times)."""
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # as in a new process: glibc's thresholds rise by themselves with what has been freed
        assert libc.mallopt(option, 128 << 10) == 1
    kept = keep_memory(variables) if keep else False

    def step() -> None:
        results = [torch.ones(8 << 18) for _ in range(8)]
        del results

    for _ in range(2):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_a_step_frees_serves_the_next_one() -> None:
    pages = 8 * 8 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of a step
    assert run_ranks(_pages, 1, True, {})[0] == (True, pytest.approx(0, abs=pages // 2))
    assert run_ranks(_pages, 1, False, {})[0][1] > 3 * pages  # what it is good for
    assert run_ranks(_pages, 1, True, {"MALLOC_ARENA_MAX": "1"})[0][0] is False  # the user's choice stands
    assert run_ranks(_pages, 1, True, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})[0][0] is False


def _smallest(rank: int, world: int, fields: dict[str, Any]) -> tuple[float, float]:
    """Half of fp32's smallest normal number, computed by this thread and by another that torch starts."""
    settle(CpuConfig(threads=2, **fields), rank, world)
    many = torch.full((1 << 20,), torch.finfo(torch.float32).tiny) * 0.5
    return many[0].item(), many[-1].item()


def test_denormal_numbers_are_zero_in_all_threads() -> None:
    half = torch.finfo(torch.float32).tiny / 2
    assert run_ranks(_smallest, 1, {})[0] == (0.0, 0.0)
    assert run_ranks(_smallest, 1, {"flush_denormals": False})[0] == (half, half)


def _precision(rank: int, world: int, fields: dict[str, Any]) -> tuple[str, str]:
    """What torch is told about fp32 products: by a run, and by the choice that it should make."""
    settle(CpuConfig(**fields), rank, world)
    told = torch.get_float32_matmul_precision()
    return told, {"onednn": "medium", "blas": "highest"}[products.choose(fields.get("fp32_products", "auto"))]


def test_a_run_chooses_the_library_of_its_products() -> None:
    told, chosen = run_ranks(_precision, 1, {})[0]
    assert told == chosen
    assert run_ranks(_precision, 1, {"fp32_products": "blas"})[0] == ("highest", "highest")


def test_large_tensors_of_a_run_ask_for_large_pages() -> None:
    """Asked for in the kernel's own list of the process's memory; whether it has some to give is its business."""
    code = """
import pretrain.main, torch
x = torch.ones(16 << 20)
low, wanted = x.data_ptr(), None
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        inside = first <= low + (32 << 20) < last
    elif line.startswith("VmFlags") and inside:
        wanted = "hg" in line.split()
print(wanted)
"""
    for given, expected in (({}, "True"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "False")):
        environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | given
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == expected, done.stderr


def _trained(rank: int, world: int, run: Path, corpus: Path, *overrides: str) -> tuple[int, int, list[int]]:
    code = train_on_rank(rank, world, run, corpus, ("train.steps=1", "train.batch=2", *overrides))
    return code, torch.get_num_threads(), sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
def test_a_run_applies_it(tmp_path: Path, corpus: Path) -> None:
    ((code, threads, _),) = run_ranks(_trained, 1, tmp_path / "one", corpus, "cpu.threads=2", preload=TRAINING)
    assert (code, threads) == (0, 2)
    first, second = run_ranks(_trained, 2, tmp_path / "two", corpus, "cpu.bind=cores", preload=TRAINING)
    assert first[0] == second[0] == 0 and not set(first[2]) & set(second[2])
