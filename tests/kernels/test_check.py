"""The offline checker: planted faults are caught, and what cannot be judged is never passed."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from kernels import check, tuning
from kernels.architecture import facts
from kernels.dispatch import Form
from kernels.offline import faults, sweep, trace
from kernels.offline.figures import Dots, Figures, Unreadable, count_dots
from kernels.offline.requests import Case
from kernels.offline.verdict import problems

SOUND = Figures(
    registers=100,
    accumulation_registers=0,
    spills=0,
    scalar_spills=0,
    scratch=0,
    shared=16384,
    warps=4,
    blocks=4,
    occupancy=4.0,
    matrix={"v_mfma_f32_16x16x16_bf16": 8},
    dots=Dots(2, 2, 0),
    wide_loads=4,
    loads=4,
)


@pytest.mark.parametrize("arch", ["gfx942", "sm90"])
def test_every_planted_fault_is_caught_and_the_sound_kernel_passes(arch):
    outcomes = {fault.name: (result, right) for fault, result, right in faults.run(arch)}
    wrong = [name for name, (_, right) in outcomes.items() if not right]
    assert wrong == []
    sound = outcomes["nothing wrong"][0].figures
    assert sound.spills == sound.scratch == 0
    assert sum(sound.matrix.values()) == {"gfx942": 24, "sm90": 4}[arch]
    assert sound.wide_loads == sound.loads > 0
    assert sound.shared in (16384, 49152)


def test_the_mutation_run_fails_when_a_fault_goes_unnoticed(monkeypatch, capsys):
    monkeypatch.setattr("kernels.offline.sweep.problems", lambda figures, arch: [])  # a checker that never says no
    assert check.main(["--mutate", "--arch", "gfx942"]) == 1
    out = capsys.readouterr().out
    assert "FAULT (missed)" in out
    assert "registers spill: the checker found nothing, expected spill" in out


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, []),
        ({"scalar_spills": 76}, []),  # to lanes of vector registers, no memory traffic
        ({"spills": 1}, ["spill"]),
        ({"scratch": 8}, ["scratch"]),
        ({"matrix": {}}, ["matrix"]),
        ({"matrix": {}, "dots": Dots(2, 0, 0)}, []),
        ({"dots": Dots(2, 2, 1)}, ["matrix"]),
        ({"shared": 65537, "occupancy": 0.0}, ["shared"]),
        ({"shared": 65536, "occupancy": 1.0}, []),
        ({"occupancy": 0.5}, ["occupancy"]),
    ],
)
def test_verdicts(change, kinds):
    import dataclasses

    found = problems(dataclasses.replace(SOUND, **change), facts("gfx942"))
    assert [kind for kind, _ in found] == kinds


TTIR = """
tt.func public @k() {
  %1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32> loc(#l)
  %2 = tt.dot %a, %b, %c : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32> loc(#l)
"""
TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3}>
tt.func public @k() {
  %1 = tt.dot %a, %b, %c : tensor<64x64xbf16, #ttg.dot_op<{p = #mma}>> * tensor<64x64xbf16, #x> -> tensor<64x64xf32, LAYOUT>
"""


def test_dots_are_counted_by_what_the_vendor_can_do():
    assert count_dots(TTIR, TTGIR.replace("LAYOUT", "#mma"), "nvidia") == Dots(2, 1, 0)  # full fp32 has no instruction
    assert count_dots(TTIR, TTGIR.replace("LAYOUT", "#mma"), "amd") == Dots(2, 2, 0)
    assert count_dots(TTIR, TTGIR.replace("LAYOUT", "#blocked"), "nvidia") == Dots(2, 1, 1)
    with pytest.raises(Unreadable):
        count_dots("", TTGIR, "amd")
    with pytest.raises(Unreadable, match="a dot"):
        count_dots(TTIR.replace("tensor<64x64xbf16> *", "?"), TTGIR, "amd")


def _form(why_not=lambda request: None):
    return Form("triton", "kernels.offline.faults", "product", why_not)


def _case(run, required=True):
    return Case("short_conv", "a case", run, required)


@pytest.fixture
def only(monkeypatch):
    """Reduces an operator to one case."""

    def reduce(case):
        monkeypatch.setattr(sweep, "cases", lambda op: [case] if case else [])
        monkeypatch.setattr(sweep, "triton_forms", lambda op: [_form()])

    return reduce


def _convolve(why_not=None):
    """A call of an operator whose Triton form is known to compile."""

    def run():
        from kernels.short_conv import short_convolution

        x, weight = torch.zeros(1, 64, 64, requires_grad=True), torch.zeros(64, 4, requires_grad=True)
        return [short_convolution(x, weight)[0]], [x, weight]

    return run


def test_an_operator_is_compiled_forward_and_backward_through_its_public_function(only):
    only(_case(_convolve()))
    results, asked = sweep.sweep("short_conv", "gfx942")
    names = {result.kernel for result in results}
    assert "forward_kernel" in names
    assert len(names) >= 2  # and at least one for the backward pass
    assert all(result.figures is not None and result.figures.registers > 0 for result in results)
    assert all(len(result.grid) == 1 and result.grid[0] >= 1 for result in results)
    assert "short_conv_forward" in asked
    assert len(asked) >= 2


def test_what_cannot_be_judged_is_a_fault(only):
    def kinds():
        results, _ = sweep.sweep("short_conv", "gfx942")
        return [kind for result in results for kind, _ in result.problems]

    only(None)  # a Triton form and no requests
    assert kinds() == ["request"]

    tensor = torch.zeros(2, requires_grad=True)
    only(_case(lambda: ([tensor * 2], [tensor])))  # a call that launches nothing
    assert kinds() == ["request"]

    def broken():
        raise RuntimeError("boom")

    only(_case(broken))
    assert kinds() == ["request"]


def test_a_declined_request_is_a_fault_only_where_it_must_be_served(only, monkeypatch):
    import kernels.short_conv as module

    forms = (_form(lambda request: f"no, not on {request.device.type}"),)
    monkeypatch.setattr(module, "FORMS", forms)
    only(_case(_convolve()))
    (result,) = sweep.sweep("short_conv", "gfx942")[0]
    assert result.problems == [("request", "the Triton form declines: no, not on cuda")]
    only(_case(_convolve(), required=False))
    (result,) = sweep.sweep("short_conv", "gfx942")[0]
    assert (result.problems, result.note) == ([], "declined: no, not on cuda")


def test_every_row_of_the_tuning_table_is_compiled(only, monkeypatch, tmp_path):
    rows = [
        {"when": {"D": 64, "T_min": 1000000}, "use": {"num_warps": 8}},  # selected by no small request: forced upon one
        {"when": {"D": 65}, "use": {"num_warps": 8}},  # fits no request
        {"when": {"T_max": 5000}, "use": {"num_warps": 2}},  # selected: it hides the default
    ]
    table = {"short_conv_forward": {"default": {"num_warps": 1}, "rows": rows}, "short_conf_forward": {}}
    (tmp_path / "gfx942.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    try:
        only(_case(_convolve()))
        results, asked = sweep.sweep("short_conv", "gfx942")
        compiled = {
            (r.case, r.options["num_warps"]) for r in results if r.kernel == "forward_kernel" and not r.problems
        }
        assert compiled == {("a case", 2), ("a case, row 0", 8), ("a case, default", 1)}
        assert [r.problems[0] for r in results if r.problems] == [
            ("row", "row 1 of short_conv_forward in gfx942.json fits no representative request: {'D': 65}")
        ]
        (unknown,) = sweep.unknown_kernels("gfx942", asked)
        assert unknown.problems == [("row", "gfx942.json has short_conf_forward, which no kernel asks for")]
    finally:
        tuning.forget()


def test_tracing_leaves_no_trace():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = (JITFunction.run, driver._active)
    with pytest.raises(RuntimeError), trace.tracing(facts("sm90")):
        raise RuntimeError
    assert (JITFunction.run, driver._active) == before
    with pytest.raises(ValueError, match="'generic' is no target"), trace.tracing(facts("generic")):
        pass


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "kernels.check", "--arch", "gfx942", "--json", str(tmp_path / "f.json")]
    run = subprocess.run([*command, "--op", "attention"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no Triton form" in run.stdout
    assert "nothing was compiled" in run.stdout
    assert json.loads((tmp_path / "f.json").read_text())["kernels"] == 0
    run = subprocess.run([*command, "--op", "telepathy"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid choice: 'telepathy'" in run.stderr


def _whole_sweep(architectures, tmp_path):
    """Runs the check on all operators, and asserts that nothing is at fault and nothing was passed over."""
    command = [sys.executable, "-m", "kernels.check", "--json", str(tmp_path / "f.json")]
    run = subprocess.run([*command, *(f"--arch={name}" for name in architectures)], capture_output=True, text=True)
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if "FAULT" in line) + run.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["faulty"] == 0
    served = {op for op in sweep.operators() if sweep.triton_forms(op)}
    assert served >= {"delta_rule", "gated_linear_attention", "norm", "short_conv"}
    kernels = {(result["arch"], result["op"]) for result in found["results"] if result["figures"] is not None}
    assert kernels == {(arch, op) for arch in architectures for op in served}
    occupancy = [result["figures"]["occupancy"] for result in found["results"] if result["figures"] is not None]
    assert min(occupancy) >= 1


def test_every_kernel_is_fit_for_mi300x_and_h100(tmp_path):
    _whole_sweep(["gfx942", "sm90"], tmp_path)


@pytest.mark.campaign
def test_every_kernel_is_fit_for_the_other_architectures(tmp_path):
    _whole_sweep(["gfx950", "sm80", "sm100"], tmp_path)
