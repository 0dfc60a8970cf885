"""The benchmark: what it times, how it compares, what it refuses. No test depends on how fast anything is."""

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch

import kernels.short_conv.chunked
from kernels import bench, tuning
from kernels.benching import contenders, correctness, measure, memory, report, timing, tune
from kernels.benching.timing import Timing
from kernels.benching.workloads import CPU_SHAPES, GPU_SHAPES, WORKLOADS, Shape, Workload, chosen, leaves
from kernels.common import products

CPU = torch.device("cpu")
TINY = Shape(1, 33, 2, 16, 16)


def test_shapes_are_parsed_and_printed():
    assert Shape.parse("B1T8192H96D128") == Shape(1, 8192, 96, 128, 128)
    assert Shape.parse("T64H2K32V16") == Shape(1, 64, 2, 32, 16)
    for text in (*CPU_SHAPES, *GPU_SHAPES, "B1T64H2K32V16"):
        assert str(Shape.parse(text)) == text
    for text in ("B1", "T64", "8192", "B1T64H2D0", "b1t64h2d8"):
        with pytest.raises(ValueError, match=r"B1T2048H4D128|lacks T or D"):
            Shape.parse(text)


def test_workloads_are_chosen_by_name_or_operator():
    assert [w.name for w in chosen(["delta_rule"])] == ["delta_net", "gated_delta_net", "kda"]
    assert [w.name for w in chosen(["kda", "delta_rule"])] == ["kda", "delta_net", "gated_delta_net"]
    assert len(chosen([])) == len(WORKLOADS)
    with pytest.raises(ValueError, match="'flash' is not timed; choose among linear_attention"):
        chosen(["flash"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs_and_every_input_gets_a_gradient(name):
    workload = WORKLOADS[name]
    inputs = workload.inputs(TINY, torch.float32, CPU)
    gradients = measure.runner(workload.call, inputs, measure.BOTH)()
    assert len(gradients) == len(leaves(inputs)) >= 1
    assert all(bool((g != 0).any()) and bool(g.isfinite().all()) for g in gradients)
    again = workload.inputs(TINY, torch.float32, CPU)
    assert all(torch.equal(a, b) for a, b in zip(leaves(inputs), leaves(again)))  # the same data for everyone


def test_statistics():
    ours, theirs = Timing((1.0, 10.0, 2.0)), Timing((2.0, 5.0, 6.0))
    assert ours.median == 2.0
    assert ours.spread == pytest.approx(9 / 2 / 2)
    assert theirs.ratio(ours) == 2.0  # the median of 2, 0.5 and 3; that of the medians would be 2.5
    assert Timing((1.0, 1.0, 3.0, 3.0)).spread == pytest.approx((3.0 - 1.0) / 2 / 2.0)


def test_calls_are_interleaved(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    result = timing.interleaved(calls, CPU, rounds=3, budget=100.0, warmups=1)
    assert "".join(order) == "AB" + "AB" + "ABABAB"  # warm-up, calibration, three rounds
    assert [len(result[name].samples) for name in "AB"] == [3, 3]


def test_the_budget_ends_rounds_but_not_below_the_least(monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", tick)
    result = timing.interleaved({"A": lambda: None}, CPU, rounds=50, budget=0.0, least=4)
    assert len(result["A"].samples) == 4


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    now, calls = [0.0], [0]

    def work():
        calls[0] += 1
        now[0] += 0.004

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    result = timing.interleaved({"A": work}, CPU, rounds=1, budget=1.0, warmups=0)
    assert calls[0] == 1 + 5  # 5 x 4 ms make a sample of 20 ms
    assert result["A"].samples[0] == pytest.approx(0.004)


def test_peak_memory_counts_what_lives_at_once():
    def call():
        a = torch.empty(250_000)  # 1 MB
        b = torch.empty(250_000)
        del a
        return torch.empty(250_000) + b[0]  # with the sum, three live at once: b, the new one and the result

    assert memory.peak_bytes(call, CPU) == pytest.approx(3_000_000, rel=0.01)
    assert memory.peak_bytes(lambda: torch.empty(250_000), CPU) == pytest.approx(1_000_000, rel=0.01)


def test_memory_levels_are_in_the_order_of_time_and_of_one_device():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(time, size, device=cpu, name="[memory]"):
        return SimpleNamespace(
            start_ns=lambda: time, nbytes=lambda: size, device_type=lambda: device, name=lambda: name
        )

    events = [
        event(30, -5),
        event(10, 5),
        event(20, 7, cuda),
        event(20, 8),
        event(20, -8),
        event(15, 9, name="aten::mm"),
    ]
    assert memory.memory_levels(events, cpu) == [(10, 5), (20, 13), (20, 5), (30, 0)]
    assert memory.memory_levels(events, cuda) == [(20, 7)]
    assert memory.memory_levels([], cpu) == []


def test_verdicts_need_no_tensors_and_no_gpu(monkeypatch):
    monkeypatch.delenv("BRAID_KERNELS", raising=False)
    huge = Shape(64, 1 << 20, 128, 256, 256)
    verdicts = dict(contenders.verdicts(WORKLOADS["kda"], huge, torch.bfloat16, CPU))
    assert verdicts["chunked"] == "chosen"
    assert "the tensors are on cpu" in verdicts["triton"]


def test_each_of_our_forms_is_really_the_one_that_runs(monkeypatch):
    called = []
    original = kernels.short_conv.chunked.short_convolution_chunked

    def spy(*args, **kwargs):
        called.append("chunked")
        return original(*args, **kwargs)

    monkeypatch.setattr(kernels.short_conv.chunked, "short_convolution_chunked", spy)
    workload = WORKLOADS["short_convolution"]
    found = {c.name: c for c in contenders.ours(workload, TINY, torch.float32, CPU, reference=True)}
    inputs = workload.inputs(TINY, torch.float32, CPU)
    found["braid reference"].call(inputs)
    assert called == []
    found["braid chunked"].call(inputs)
    assert called == ["chunked"]
    assert found["braid triton"].objection is not None
    long = Shape(1, 4096, 2, 16, 16)
    loops = {c.name: c for c in contenders.ours(workload, long, torch.float32, CPU, reference=True)}
    assert loops["braid reference"].objection == "a token loop: only up to T = 2048"


def _measure(workload, **changes):
    options = {"families": (), "reference": False, "rounds": 3, "budget": 0.0, **changes}
    return {m.contender: m for m in measure.measure(workload, TINY, torch.float32, CPU, [measure.FORWARD], **options)}


def test_peers_take_part_where_they_can_and_say_why_not(monkeypatch):
    def good(inputs):
        return torch.nn.functional.rms_norm(inputs["x"], inputs["x"].shape[-1:], inputs["weight"], 1e-6)

    def absent():
        raise ImportError("no module named telepathy")

    def broken(inputs):
        raise RuntimeError("out of luck")

    peers = (
        contenders.Peer("torch", "good", ("cpu",), lambda: good),
        contenders.Peer("torch", "twice", ("cpu",), lambda: lambda inputs: 2 * good(inputs)),
        contenders.Peer("fla", "absent", ("cpu",), absent),
        contenders.Peer("fla", "broken", ("cpu",), lambda: broken),
        contenders.Peer("fla", "elsewhere", ("cuda",), lambda: good),
        contenders.Peer("torch", "unusual", ("cpu",), lambda: good, usual=()),
    )
    monkeypatch.setitem(contenders.PEERS, "rms_norm", peers)
    found = _measure(WORKLOADS["rms_norm"], families=None)
    assert set(found) == {"braid triton", "braid chunked", "torch good", "torch twice", "fla absent", "fla broken"}
    assert found["fla absent"].note == "not usable: ImportError: no module named telepathy"
    assert found["fla broken"].note == "failed: RuntimeError: out of luck"
    assert found["braid chunked"].ratio == 1.0
    assert found["torch good"].difference < 1e-6
    assert found["torch twice"].difference == pytest.approx(1.0, rel=1e-5)  # it computes something else
    assert "torch unusual" in _measure(WORKLOADS["rms_norm"], families=("torch",))
    assert set(_measure(WORKLOADS["rms_norm"])) == {"braid triton", "braid chunked"}


def test_a_failure_of_our_own_form_is_an_error(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(kernels.short_conv.chunked, "short_convolution_chunked", broken)
    arguments = ["short_convolution", "--shapes", "T33H2D16", "--against", "none", "--rounds", "3", "--budget", "0"]
    assert bench.main([*arguments, "--device", "cpu", "--forward"]) == 1
    assert (
        "braid chunked failed on short_convolution B1T33H2D16 forward: FAILED: RuntimeError" in capsys.readouterr().err
    )


def test_the_command_line_writes_samples_conditions_and_linearity(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["rms_norm", "--shapes", "T16H2D16", "T64H2D16", "--against", "none", "--rounds", "3", "--budget", "0"]
    assert bench.main([*arguments, "--device", "cpu", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "T 64 over 16" in out
    assert "4.00" in out
    content = json.loads(file.read_text())
    assert {"machine", "processor", "load", "load_after", "commit", "torch"} <= set(content["conditions"])
    rows = [m for m in content["measurements"] if m["contender"] == "braid chunked"]
    assert [(m["shape"], m["mode"]) for m in rows] == [
        ("B1T16H2D16", "forward"),
        ("B1T16H2D16", "forward+backward"),
        ("B1T64H2D16", "forward"),
        ("B1T64H2D16", "forward+backward"),
    ]
    assert all(len(m["samples"]) == 3 and m["peak_bytes"] > 0 for m in rows)


@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_fp32_products_go_through_the_library_of_our_runs_while_it_times(library, monkeypatch, capsys):
    before, during = torch.get_float32_matmul_precision(), []
    monkeypatch.setattr(products, "why_not_onednn", lambda: None)
    monkeypatch.setattr(products, "_blas_is_narrow", lambda: library == "onednn")  # what auto goes by
    monkeypatch.setattr(bench, "measure", lambda *_, **__: during.append(products.in_use()) or [])
    assert bench.main(["rms_norm", "--shapes", "T16H2D16", "--device", "cpu"]) == 0
    assert bench.main(["rms_norm", "--shapes", "T16H2D16", "--device", "cpu", "--fp32-products", "blas"]) == 0
    assert during == [library, "blas"] and torch.get_float32_matmul_precision() == before
    first = capsys.readouterr().out.splitlines()[0]
    assert f"(fp32 products: {library}), " in first


def test_fp32_products_that_cannot_be_had_are_bad_usage(monkeypatch, capsys):
    monkeypatch.setattr(products, "why_not_onednn", lambda: "it is not there")
    assert bench.main(["rms_norm", "--device", "cpu", "--fp32-products", "onednn"]) == 2
    assert "it is not there; leave this to auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flash"], "'flash' is not timed"),
        (["--shapes", "big"], "'big' is not a shape"),
        (["--against", "fla,jax"], "--against 'jax' is unknown"),
        (["--rounds", "-1"], "--rounds must be at least 1"),
    ],
)
def test_bad_usage_exits_with_2_and_says_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_explain_prints_every_verdict(capsys, monkeypatch):
    monkeypatch.delenv("BRAID_KERNELS", raising=False)
    assert bench.main(["rms_norm", "--explain", "--device", "cpu", "--shapes", "T64H2D16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("chunked" in line and "chosen" in line for line in lines)
    assert any("triton" in line and "cpu" in line for line in lines)


def test_the_correctness_check_passes_and_fails(monkeypatch, capsys):
    workload = WORKLOADS["short_convolution"]
    results = list(correctness.compare([workload], CPU))
    assert {r.tensor for r in results} == {"output", "gradient of x", "gradient of weight"}
    assert all(r.passed for r in results)
    assert max(r.error for r in results if "float32" in r.case) < 1e-6

    original = kernels.short_conv.chunked.short_convolution_chunked

    def off(x, weight, *args, **kwargs):
        y, state = original(x, weight, *args, **kwargs)
        return y + 3e-5 * y.detach(), state  # the output is off, the gradients are not

    monkeypatch.setattr(kernels.short_conv.chunked, "short_convolution_chunked", off)
    wrong = [r for r in correctness.compare([workload], CPU) if not r.passed]
    assert [(r.tensor, r.form) for r in wrong] == [("output", "chunked")]
    assert wrong[0].error == pytest.approx(3e-5, rel=0.05)
    assert bench.main(["short_convolution", "--check", "--device", "cpu"]) == 1
    assert "1 off" in capsys.readouterr().out


def test_the_correctness_check_covers_states_gradients_and_failures(monkeypatch):
    workload = WORKLOADS["gated_delta_net"]
    packed = next(case for case in correctness.cases(workload, CPU) if case.lengths)
    results = list(correctness._compare(workload, packed, CPU))
    names = {"output", "final state"} | {f"gradient of {n}" for n in ("q", "k", "v", "beta", "g", "initial_state")}
    assert {r.tensor for r in results} == names
    assert all(r.passed for r in results)
    assert not correctness.Comparison("w", "c", "f", "t", math.nan, 1.0).passed

    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    # kernels.delta_rule is the function; its folder is only in sys.modules
    monkeypatch.setattr(importlib.import_module("kernels.delta_rule.chunked"), "delta_rule_chunked", broken)
    (result,) = correctness._compare(workload, packed, CPU)
    assert not result.passed
    assert result.note == "RuntimeError: boom"


TABLE = {"scan": [{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}, {"BLOCK": 128}]}
DEFAULTS = {"scan": {"generic": {"BLOCK": 32, "num_warps": 4}}}


def _tunable(tmp_path, monkeypatch):
    """A workload whose one kernel has the best time at BLOCK 64, does not fit at 128, and is wrong at 16."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(inputs):
        use = tuning.parameters("scan", "sm90", defaults=DEFAULTS, K=16, T=33, dtype="fp32")
        if use["BLOCK"] == 128:
            raise RuntimeError("out of resources: shared memory")
        now[0] += {16: 0.1, 32: 1.0, 64: 0.5}[use["BLOCK"]]
        return inputs["x"] * (2.0 if use["BLOCK"] == 16 else 1.0)

    return Workload("scan", "scan", lambda *_: {"x": torch.ones(4, requires_grad=True)}, call)


def test_tuning_finds_the_fastest_right_candidate(tmp_path, monkeypatch):
    workload = _tunable(tmp_path, monkeypatch)
    lines = []
    (choice,) = tune.tune(workload, TINY, torch.float32, CPU, table=TABLE, rounds=3, say=lines.append)
    tuning.forget()
    assert (choice.best, choice.tried, choice.failed) == ({"BLOCK": 64}, 4, 2)
    assert (choice.seconds_before, choice.seconds_best) == (pytest.approx(1.0), pytest.approx(0.5))
    assert lines == ["scan B1T33H2D16 scan: 4 tried, 2 failed, 1000.000 ms -> 500.000 ms {'BLOCK': 64}"]


def test_tuned_rows_are_written_read_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    keys = {"K": 16, "T": 33, "dtype": "fp32"}

    def choice(best, before=None):
        return tune.Choice("scan", keys, before or {"BLOCK": 32}, best, 1.0, 0.5, 4, 2)

    assert tune.write("sm90", [choice({"BLOCK": 32})], "here", tmp_path) == 0
    assert not (tmp_path / "sm90.json").exists()
    assert tune.write("sm90", [choice({"BLOCK": 64})], "here", tmp_path) == 1
    assert tuning.parameters("scan", "sm90", defaults=DEFAULTS, **keys) == {"BLOCK": 64, "num_warps": 4}
    assert tuning.parameters("scan", "sm90", defaults=DEFAULTS, K=16, T=63, dtype="fp32")["BLOCK"] == 64
    for T, dtype in ((64, "fp32"), (31, "fp32"), (33, "bf16")):
        assert tuning.parameters("scan", "sm90", defaults=DEFAULTS, K=16, T=T, dtype=dtype)["BLOCK"] == 32
    assert tune.write("sm90", [choice({"BLOCK": 8})], "there", tmp_path) == 1
    (row,) = json.loads((tmp_path / "sm90.json").read_text())["scan"]["rows"]
    assert row["when"] == {"K": 16, "T_min": 32, "T_max": 63, "dtype": "fp32"}
    assert row["use"] == {"BLOCK": 8}
    assert row["measured"] == "500.000 ms, 1000.000 ms before; there"
    tuning.forget()


def test_the_candidates_of_an_operator_are_collected_and_known_to_it():
    pytest.importorskip("triton")
    found = tune.candidates("short_conv")
    assert "short_conv_forward" in found
    assert all(isinstance(option, dict) for options in found.values() for option in options)


def test_the_report_shows_a_dash_for_what_is_not_known():
    row = report.row(measure.Measurement("w", "T64H2D16", "fp32", "forward", "c", note="why"))
    assert row == ("w", "T64H2D16", "fp32", "forward", "c", "-", "-", "-", "-", "-", "why")
