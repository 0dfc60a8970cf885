"""Products: layouts, dtypes, answers checked, what is left out, ceilings and plateaus."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.benching.hardware import dtypes, matmul, plateau
from kernels.benching.hardware.clock import Clock
from kernels.benching.hardware.dtypes import Kind
from kernels.benching.timing import Timing
from kernels.common import products
from tests.kernels.benching.hardware_rows import product

CPU = torch.device("cpu")
QUICK = Clock(CPU, 2, budget=0.0)


def _kinds(*names: str) -> list[Kind]:
    return [dtypes.kind(name, CPU) for name in names]


def test_shapes_are_parsed() -> None:
    assert matmul.parse("8192x4096x2048,1x2x3") == [(8192, 4096, 2048), (1, 2, 3)]
    assert matmul.parse(" 8X4x2 ") == [(8, 4, 2)]
    for text in ("8x4", "8x4x0", "8x4xk", "", ",", "8x4x2x1", "-1x2x3"):
        with pytest.raises(ValueError, match="MxNxK"):
            matmul.parse(text)


def test_tasks_go_dtype_by_dtype_from_little_work_to_much() -> None:
    tasks = matmul.tasks(_kinds("fp32", "bf16"), ["nn", "tn"], [*matmul.grid([32, 16], [8]), (1, 1, 1)], ["default"])
    assert [t.kind.name for t in tasks] == ["fp32"] * 10 + ["bf16"] * 10
    assert [(t.size, t.layout) for t in tasks[:4]] == [
        ((1, 1, 1), "nn"), ((1, 1, 1), "tn"), ((16, 16, 8), "nn"), ((16, 16, 8), "tn"),
    ]  # fmt: skip
    assert tasks[9].size == (32, 32, 8)
    fp8 = Kind("fp8", torch.float8_e4m3fn, 0.02)
    assert [t.layout for t in matmul.tasks([fp8], matmul.LAYOUTS, [(16, 16, 16)], ["default"])] == ["nt"]
    assert [t.library for t in matmul.tasks([fp8], ["nt"], [(1, 1, 1)], ["a", "b"])] == ["a", "b"]


def test_operands_lie_in_memory_as_the_layout_says(monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def spy(self: Kind, a: Tensor, b: Tensor, out: Tensor | None, one: Tensor | None) -> Tensor:
        assert (a.shape, b.shape) == ((3, 7), (7, 5))
        assert float(a[0, 0]) != float(b[0, 0])  # not one matrix
        strides.append((a.stride(), b.stride()))
        return torch.mm(a, b, out=out)

    monkeypatch.setattr(Kind, "multiply", spy)
    for layout, wanted in (("nn", ((7, 1), (5, 1))), ("nt", ((7, 1), (1, 7))), ("tn", ((1, 3), (5, 1)))):
        strides.clear()
        (row,) = matmul.measure(matmul.tasks(_kinds("fp32"), [layout], [(3, 5, 7)], ["default"]), QUICK)
        assert row.valid
        assert set(strides) == {wanted}


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp8"])
def test_every_dtype_multiplies_right_in_every_layout(name: str) -> None:
    try:
        kinds = _kinds(name)
    except ValueError as error:
        pytest.skip(str(error))
    rows = list(matmul.measure(matmul.tasks(kinds, matmul.LAYOUTS, [(48, 32, 64), (33, 20, 65)], ["default"]), QUICK))
    # fp8 takes multiples of 16 only on most devices: such a row says so, and no other.
    assert all(row.valid or (name == "fp8" and row.m == 33 and row.note.startswith("did not run")) for row in rows)
    good = [row for row in rows if row.valid]
    assert {row.layout for row in good} == ({"nt"} if name == "fp8" else set(matmul.LAYOUTS))
    assert all(0.0 < row.error < kinds[0].tolerance and row.tflops > 0 for row in good if row.error is not None)


@pytest.mark.parametrize(
    "spoil", [lambda x: x.mul_(1.03), lambda x: x[-1].fill_(0.0), lambda x: x[:, -1].fill_(torch.nan)]
)
def test_a_wrong_answer_is_named_and_counts_for_nothing(spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Kind, a: Tensor, b: Tensor, out: Tensor | None, one: Tensor | None) -> Tensor:
        result = torch.mm(a, b, out=out)
        spoil(result)
        return result

    monkeypatch.setattr(Kind, "multiply", off)
    rows = list(matmul.measure(matmul.tasks(_kinds("bf16"), ["nt"], [(64, 48, 32)], ["default"]), QUICK))
    assert rows[0].note.startswith("WRONG: off by")
    assert rows[0].timing is not None and not rows[0].valid
    assert plateau.ceilings(rows) == {}


def test_what_does_not_run_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(self: Kind, a: Tensor, b: Tensor, out: Tensor | None, one: Tensor | None) -> Tensor:
        if a.shape[0] == 32:
            raise torch.OutOfMemoryError("tried to allocate 2 TiB\nand more words")
        return torch.mm(a, b, out=out)

    monkeypatch.setattr(Kind, "multiply", scarce)
    shapes = [(16, 16, 16), (32, 16, 16), (64, 16, 16)]
    rows = list(matmul.measure(matmul.tasks(_kinds("fp32"), ["nn"], shapes, ["default"]), QUICK))
    assert [row.note for row in rows] == ["", "did not run: tried to allocate 2 TiB", ""]


def test_what_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_one", lambda task, operands, clock: (Timing((1.0,)), 0.0))  # 1 s for 8192 FLOP
    rows = list(
        matmul.measure(matmul.tasks(_kinds("fp32"), ["nn"], [(16, 16, 16), (1024, 16, 16)], ["default"]), QUICK)
    )
    assert [row.note for row in rows] == ["", "left out: one would take 64 s"]


def test_unknown_dtypes_and_those_that_a_cpu_lacks() -> None:
    with pytest.raises(ValueError, match="'int4' is not a dtype; choose among bf16, fp16, fp32, tf32, fp8"):
        dtypes.kind("int4", CPU)
    with pytest.raises(ValueError, match="tf32 is a mode of NVIDIA GPUs"):
        dtypes.kind("tf32", CPU)


def test_tf32_is_fp32_storage_at_a_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    found = dtypes.kind("tf32", torch.device("cuda"))
    assert (found.storage, found.precision) == (torch.float32, "high")
    assert dtypes.kind("fp32", torch.device("cuda")).precision == "highest"
    capability[0] = (7, 5)
    with pytest.raises(ValueError, match="tf32"):
        dtypes.kind("tf32", torch.device("cuda"))
    capability[0] = (9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="tf32"):
        dtypes.kind("tf32", torch.device("cuda"))


def test_fp8_is_the_variant_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_probe", lambda fp8, device: None)
    for name, storage in (
        ("gfx942", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
        ("sm90", torch.float8_e4m3fn),
    ):
        monkeypatch.setattr(dtypes, "architecture", lambda device, name=name: name)
        assert dtypes.kind("fp8", torch.device("cuda")).storage == storage


def test_a_device_without_fp8_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*operands: object, **more: object) -> Tensor:
        raise RuntimeError("compute capability is too low\nat some line")

    monkeypatch.setattr(torch, "_scaled_mm", absent)
    with pytest.raises(ValueError, match=r"torch has no fp8 product for this device \(compute capability is too low\)"):
        dtypes.kind("fp8", CPU)


def test_fp32_products_are_exact_whatever_the_process_had_set() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with dtypes.precision(dtypes.kind("fp32", CPU)):
            assert torch.get_float32_matmul_precision() == "highest"
        with dtypes.precision(Kind("tf32", torch.float32, 1.0, precision="high")):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_plateau_of_a_known_curve() -> None:
    # Rate = 800 W / (W + 10 GFLOP) reaches 90 % of its end at 90 GFLOP; sizes are 2 x 1000 x 1000 x k: k / 500 GFLOP.
    rows = [product(1000, 1000, k, 800 * k / 500 / (k / 500 + 10)) for k in (500 * 2**i for i in range(20))]
    ceiling = plateau.ceilings(rows)["bf16"]
    assert ceiling.tflops == pytest.approx(800, rel=1e-4)
    assert ceiling.best.k == 500 * 2**19
    assert ceiling.first_gflop == pytest.approx(128)  # the first of 1, 2, 4, ... from 90 on
    assert ceiling.usual_gflop == pytest.approx(128)


def test_a_lucky_small_product_moves_the_first_and_not_the_usual() -> None:
    sizes = (1024, 2048, 4096, 8192)
    rows = [product(m, n, 4096, 95 if m * n >= 4096**2 else 50) for m in sizes for n in sizes]
    rows.append(product(1024, 1024, 4096, 100, layout="tn"))
    ceiling = plateau.ceilings(rows)["bf16"]
    assert (ceiling.tflops, ceiling.first.size, ceiling.layouts) == (pytest.approx(100), (1024, 1024, 4096), {
        "nt": pytest.approx(95), "tn": pytest.approx(100),
    })  # fmt: skip
    assert ceiling.usual_gflop == pytest.approx(2 * 4096**3 / 1e9)
    # The largest are slow: from no work on is 90 % usual.
    assert plateau.usual([*rows, *[product(16384, 16384, 4096, 10)] * 3], 90.0) is None


def test_dtypes_have_their_own_ceilings() -> None:
    rows = [product(64, 64, 64, 2.0), product(64, 64, 64, 1.0, "fp32"), product(64, 64, 64, 9.0, "fp32", note="WRONG")]
    found = plateau.ceilings(rows)
    assert {name: c.tflops for name, c in found.items()} == {"bf16": pytest.approx(2.0), "fp32": pytest.approx(1.0)}


def test_the_time_that_is_left() -> None:
    tasks = matmul.tasks(_kinds("fp32", "bf16"), ["nn"], [(100, 100, 100), (1000, 1000, 1000)], ["default"])
    clock = Clock(CPU, 5)
    done = [product(100, 100, 100, 0.02, "fp32", "nn")]
    # 2 GFLOP at 0.02 TFLOP/s take 0.1 s, timed in 0.7 s; bf16 is guessed at the same rate: 0.7 s and 2 x 0.1 ms + 50 ms.
    assert matmul.seconds_left(tasks, done, clock) == pytest.approx(0.7 + 0.7 + 0.0502)
    assert matmul.seconds_left(tasks, [product(100, 100, 100, 1.0)] * 4, clock) == 0.0


def test_the_library_of_a_cpu_is_chosen_for_its_products_only() -> None:
    with products.kept():
        torch.set_float32_matmul_precision("medium")
        with matmul._library("blas", CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    with matmul._library("default", CPU):  # what our runs do
        told = torch.get_float32_matmul_precision()
    with products.kept():
        assert told == {"onednn": "medium", "blas": "highest"}[products.choose("auto")]
