"""Devices and disks at work: probes on a machine that is well, and on one that is not (sabotage.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launch.preflight import compute, disk
from launch.preflight.node import PROBES, Node, Probed
from launch.preflight.tools import Answer, Tools
from tests.launch.preflight.machines import ask, by_subject, mi300x, node, nvidia, one, pci, sabotaged

SMALL = 1 << 20


@pytest.fixture(scope="module")
def device() -> ModuleType:
    """The probe as a module, so that most of it is tested without starting torch again."""
    spec = importlib.util.spec_from_file_location("device_probe", PROBES / "device.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sabotage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tests.launch.preflight import sabotage as faults

    for owner, attribute in ((torch, "mm"), (torch.Tensor, "fill_"), (torch.Tensor, "copy_")):
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # put back afterwards
    getattr(faults, name)()


def cpu() -> object:
    import torch

    return torch.device("cpu")


def test_a_healthy_device(device: ModuleType) -> None:
    found = device.matmul(cpu())
    assert (found["wrong_rows"], found["different"], found["finite"]) == (0, 0, True) and found["tflops"] > 0
    found = device.memory(cpu(), 3 * SMALL + 8)
    assert found == {"bytes": 3 * SMALL + 8, "patterns": 5, "wrong_words": 0, "first_wrong": None}


def test_whole_numbers_stay_exact_at_the_sizes_of_a_gpu() -> None:
    """Sums must stay within what bf16 holds exactly (256), or a healthy GPU would be called wrong."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, shape, generator=generator) for shape in ((4096, 2048), (2048, 4096)))
    largest = max(int((a[rows].float() @ b.float()).abs().max()) for rows in torch.arange(4096).split(1024))
    assert 150 < largest <= 256


@pytest.mark.parametrize(
    ("fault", "key", "value"),
    [("wrong_bits", "wrong_rows", 2), ("fickle_bits", "different", 1), ("not_finite", "finite", False)],
)
def test_products_that_are_wrong(
    fault: str, key: str, value: object, device: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(fault, monkeypatch)
    assert device.matmul(cpu())[key] == value


@pytest.mark.parametrize(("fault", "wrong", "first"), [("stuck_bit", 2, 8000), ("crossed_lines", 1, 56)])
def test_memory_that_forgets(
    fault: str, wrong: int, first: int, device: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(fault, monkeypatch)
    found = device.memory(cpu(), SMALL)
    assert (found["wrong_words"], found["first_wrong"]) == (wrong, first)


# --------------------------------------------------------------------------------------------------- what is made of the answers


def test_the_device_checks_on_this_machine(tmp_path: Path) -> None:
    of = without_gpu(sabotaged(tmp_path, memory=SMALL, root=tmp_path))
    results = by_subject(ask(compute.CHECKS, "matmul", of))
    assert results["cpu"].status == "pass" and results["cpu"].text.startswith("exact, and the same bits 4 times;")
    assert by_subject(ask(compute.CHECKS, "memory_test", of))["cpu"].text == "1.0 MiB kept 5 patterns"
    assert results["gpu"].status == "not checked" and "no GPU" in results["gpu"].text


def test_a_device_that_is_wrong_and_forgets(tmp_path: Path) -> None:
    of = without_gpu(sabotaged(tmp_path, "wrong_bits", "stuck_bit", memory=SMALL, root=tmp_path))
    result = by_subject(ask(compute.CHECKS, "matmul", of))["cpu"]
    assert result.status == "fail" and "2 row(s) of products with a known result are wrong" in result.text
    result = by_subject(ask(compute.CHECKS, "memory_test", of))["cpu"]
    assert result.status == "fail" and "2 word(s) came back changed, the first at byte 8,000" in result.text


def test_a_device_that_hangs_is_told_and_does_not_hang_the_tool(tmp_path: Path) -> None:
    of = without_gpu(sabotaged(tmp_path, "hangs_in_matmul", root=tmp_path, limit=2.0))
    result = by_subject(ask(compute.CHECKS, "matmul", of))["cpu"]
    assert (result.status, result.text) == ("fail", "in matmul: the process that uses it did not answer within 2 s")
    result = by_subject(ask(compute.CHECKS, "memory_test", of))["cpu"]
    assert (result.status, result.text) == ("not checked", "the process that uses it has not come past matmul")


def without_gpu(of: Node) -> Node:
    """Spares a node the question what torch sees."""
    of._known["torch"] = Probed({}, "", Answer(0, "", ""))
    return of


def answered(tmp_path: Path, answers: dict[str, Probed]) -> Node:
    """A node with two GPUs, whose probes have said this."""
    of = node(tmp_path, {**pci("0000:18:00.0"), **pci("0000:19:00.0")}, {"nvidia-smi": nvidia(2)})
    of._known["torch"] = Probed({}, "", Answer(0, "", ""))
    of._known["work matmul memory"] = answers
    return of


GOOD = {"wrong_rows": 0, "different": 0, "finite": True, "tflops": 700.0, "repeats": 30}
KEPT = {"bytes": 1 << 30, "patterns": 5, "wrong_words": 0, "first_wrong": None}


LATE = "python did not answer within 60 s"
STUCK = f"{LATE} and does not end although killed"
WELL = Answer(0, "", "")
NO_TORCH = Answer(1, "", "ModuleNotFoundError: No module named 'torch'")


def after(
    work: dict[str, object] | None = None, memory: dict[str, object] | None = None
) -> dict[str, dict[str, object]]:
    stages: dict[str, dict[str, object]] = {"start": {}}
    return stages | ({"matmul": work} if work else {}) | ({"memory": memory} if memory else {})


@pytest.mark.parametrize(
    ("probed", "matmul", "memory", "text"),
    [
        (Probed(after(GOOD, KEPT), "", WELL), "pass", "pass", "700 TFLOP/s"),
        (Probed(after(GOOD), "memory", Answer(-9, "", "", LATE)), "pass", "fail", ""),
        (
            Probed(after(), "matmul", Answer(-9, "", "", LATE)),
            "fail",
            "not checked",
            "in matmul: the process that uses it did",
        ),
        (
            Probed({}, "start", Answer(-9, "", "", STUCK)),
            "fail",
            "fail",
            "in being woken: the process that uses it did not",
        ),
        (
            Probed({}, "start", Answer(-9, "", "", STUCK)),
            "fail",
            "fail",
            "within 60 s and does not end although killed",
        ),
        (Probed(after(), "matmul", Answer(-11, "", "")), "fail", "not checked", "was killed by SIGSEGV"),
        (
            Probed({"start": {"error": "CUDA error: unavailable"}}, "", WELL),
            "fail",
            "fail",
            "cannot be used: CUDA error",
        ),
        (Probed(after({"error": "OutOfMemoryError: tried"}, KEPT), "", WELL), "fail", "pass", "OutOfMemoryError"),
        (Probed({}, "", NO_TORCH), "not checked", "not checked", "not installed"),
        (Probed({}, "", Answer(1, "", "ImportError: libamdhip64.so")), "fail", "fail", "ended with 1: ImportError"),
        (Probed(after({**GOOD, "finite": False}, KEPT), "", WELL), "fail", "pass", "not finite"),
        (Probed(after({**GOOD, "different": 3}, KEPT), "", WELL), "fail", "pass", "differs in 3 place(s)"),
    ],
)
def test_what_is_made_of_an_answer(probed: Probed, matmul: str, memory: str, text: str, tmp_path: Path) -> None:
    of = answered(tmp_path, {"gpu 0": probed})
    (result,) = ask(compute.CHECKS, "matmul", of)
    assert (result.status, result.subject) == (matmul, "gpu 0") and text in result.text
    assert one(compute.CHECKS, "memory_test", of).status == memory


def test_a_gpu_that_lags_behind_the_others(tmp_path: Path) -> None:
    speeds = {"cpu": 0.1, "gpu 0": 700.0, "gpu 1": 710.0, "gpu 2": 500.0, "gpu 3": 690.0}
    answers = {
        subject: Probed({"matmul": {**GOOD, "tflops": speed}}, "", Answer(0, "", ""))
        for subject, speed in speeds.items()
    }
    results = by_subject(ask(compute.CHECKS, "matmul", answered(tmp_path, answers)))
    assert {subject for subject, result in results.items() if result.status == "warn"} == {"gpu 2"}
    assert results["gpu 2"].text == "500 TFLOP/s, where the median of this node is 695"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"gpu 0": "0", "gpu 1": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {"gpu 1": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-77, 0"}, {"gpu GPU-77": "GPU-77", "gpu 0": "0"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {}),
    ],
)
def test_each_gpu_has_a_process_that_sees_no_other(
    environ: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    of = answered(tmp_path, {})
    of.environ = {**of.environ, **environ}
    slots = {slot.subject: slot.environ["CUDA_VISIBLE_DEVICES"] for slot in compute.slots(of)}
    assert slots.pop("cpu") == "" and slots == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ["0", "1", "2", "3"]),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, ["0", "1"]),
        ({"HIP_VISIBLE_DEVICES": "3"}, ["3"]),
        ({"CUDA_VISIBLE_DEVICES": "1,3"}, ["1", "3"]),
    ],
)
def test_gpus_of_amd_that_a_job_may_see(environ: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    of = without_gpu(node(tmp_path, mi300x(4)))
    of.environ = {**of.environ, **environ}
    cpu, *gpus = compute.slots(of)
    assert cpu.environ["HIP_VISIBLE_DEVICES"] == ""
    assert [slot.environ["HIP_VISIBLE_DEVICES"] for slot in gpus] == expected


# ------------------------------------------------------------------------------------------------------------------------ disks


def test_a_healthy_disk(tmp_path: Path) -> None:
    of = sabotaged(tmp_path, free=1, root=tmp_path)
    of.folder = tmp_path / "not" / "yet"
    result = one(disk.CHECKS, "disk_space", of)
    assert result.status == "pass" and f"free in {tmp_path}" in result.text
    result = one(disk.CHECKS, "disk_sync", of)
    assert result.values["syncs"] >= 5 and result.values["rate"] > 0 and "fsyncs/s of 4 KiB" in result.text
    assert not (tmp_path / "not").exists() and not list(tmp_path.glob(".preflight*"))


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    of = node(tmp_path, folder=tmp_path / "file" / "run")
    assert one(disk.CHECKS, "disk_space", of).text == f"{tmp_path}/file is not a folder"
    assert one(disk.CHECKS, "disk_sync", of).status == "fail" and (tmp_path / "file").is_file()


@pytest.mark.parametrize(
    ("fault", "space", "sync", "text"),
    [
        ("slow_disk", "pass", "warn", "fsyncs/s of 4 KiB (12"),
        ("hopeless_disk", "pass", "fail", "1 fsyncs/s of 4 KiB"),
        ("full_disk", "pass", "fail", "No space left on device"),
        ("read_only_disk", "pass", "fail", "cannot be written: Read-only file system"),
        ("no_room", "fail", "", "wanted (--free)"),
    ],
)
def test_a_disk_that_is_not_well(fault: str, space: str, sync: str, text: str, tmp_path: Path) -> None:
    of = sabotaged(tmp_path, fault, free=1 << 30 if fault == "no_room" else 1, root=tmp_path)
    results = [one(disk.CHECKS, "disk_space", of), one(disk.CHECKS, "disk_sync", of)]
    assert results[0].status == space and (not sync or results[1].status == sync)
    assert text in results[fault != "no_room"].text
    assert not list(tmp_path.glob(".preflight*"))


@pytest.mark.parametrize(
    ("fault", "space", "sync"), [("hanging_disk", "pass", "fail"), ("hanging_folder", "fail", "fail")]
)
def test_a_disk_that_hangs(fault: str, space: str, sync: str, tmp_path: Path) -> None:
    of = sabotaged(tmp_path, fault, free=1, root=tmp_path, limit=1.5)
    assert one(disk.CHECKS, "disk_space", of).status == space
    result = one(disk.CHECKS, "disk_sync", of)
    assert result.status == sync and "hangs: no answer within the time limit" in result.text


@pytest.mark.parametrize(
    ("kind", "status"), [("ext4", "pass"), ("nfs4", "pass"), ("tmpfs", "warn"), ("overlay", "warn")]
)
def test_filesystems_that_vanish(kind: str, status: str, tmp_path: Path) -> None:
    mounts = f"/dev/x / ext4 rw 0 0\nsrv {tmp_path.parent} {kind} rw 0 0\nother {tmp_path}x xfs rw 0 0\n"
    of = sabotaged(tmp_path, files={"proc/mounts": mounts}, free=1)
    result = one(disk.CHECKS, "disk_space", of)
    assert result.status == status and (kind in result.text or status == "warn")


# --------------------------------------------------------------------------------------------------------------------- commands


def test_a_command_that_ignores_the_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def with_its_child(*a: Any, **k: Any) -> subprocess.Popen[bytes]:
        """The limit counts from here on: however slow the shell, there is a child when it is killed."""
        process = real(*a, **k)
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().endswith("\n"):
            assert process.poll() is None
            time.sleep(0.02)
        return process

    monkeypatch.setattr(subprocess, "Popen", with_its_child)
    script = f"trap '' TERM INT; (sleep 60 & echo $! > {tmp_path}/child; wait) & wait"
    start = time.monotonic()
    answer = Tools().run(["/bin/sh", "-c", script], 0.5)
    assert answer.trouble == "sh did not answer within 0.5 s" and time.monotonic() - start < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child lives on")


def test_a_process_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits inside a driver: the tool says so, and goes on."""
    import launch.preflight.tools as tools

    monkeypatch.setattr(tools, "KILL_WAIT", 0.2)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    made: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    answer = Tools().run(["/bin/sleep", "30"], 0.2)
    assert (
        answer.trouble == "sleep did not answer within 0.2 s and does not end although killed: it waits inside a driver"
    )
    assert not answer.ok and made[0].poll() is None
    made[0].kill()
    made[0].wait()


def test_answers_of_commands() -> None:
    tools = Tools()
    assert tools.run(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], 10) == (3, "out\n", "err\n", "", False)
    assert tools.run(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], 10).why == "ended with 3: err"
    assert tools.run(["/bin/sh", "-c", "kill -9 $$"], 10).why == "was killed by SIGKILL"
    absent = tools.run(["no-such-tool"], 10)
    assert absent.absent and absent.why == "no-such-tool is not installed"
    assert "cannot be started: Permission denied" in tools.run([str(PROBES)], 10).why
    tools.close()
    assert tools.run([sys.executable, "-c", ""], 10).why == "interrupted"
