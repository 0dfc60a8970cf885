"""Checks of GPUs, on what nvidia-smi, amd-smi, rocm-smi and the amdgpu driver would say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.preflight import devices, gpus, torch_check
from launch.preflight.check import Result
from launch.preflight.node import Node, Probed
from launch.preflight.tools import Answer
from tests.launch.preflight.machines import ask, by_subject, mi300x, node, nvidia, one, pci, process

NAMES = tuple(check.name for check in devices.CHECKS)
TWO = {**pci("0000:18:00.0"), **pci("0000:19:00.0")}


def found(name: str, of: Node) -> list[Result]:
    return ask(devices.CHECKS, name, of)


def h100(tmp_path: Path, **changes: str) -> Node:
    return node(tmp_path, TWO, {"nvidia-smi": nvidia(2, **changes)})


def test_two_healthy_gpus_of_nvidia(tmp_path: Path) -> None:
    of = h100(tmp_path)
    assert one(devices.CHECKS, "devices", of).text == "2 x NVIDIA H100 80GB HBM3 (nvidia-smi)"
    for name in ("devices", "gpu_memory", "ecc", "clocks", "foreign_processes", "driver"):
        assert [result.status for result in found(name, of)] == ["pass"], name
    assert one(devices.CHECKS, "gpu_memory", of).text == "79.6 GiB each, at most 4.0 MiB in use"
    assert one(devices.CHECKS, "driver", of).text == "nvidia driver 570.86.15, for CUDA up to 12.8"
    assert one(devices.CHECKS, "clocks", of).text == "up to 1980 MHz, not slowed, at most 31 C"
    # Errors of the past, which the GPU keeps over restarts, are no errors now.
    assert one(devices.CHECKS, "ecc", of).text == "no uncorrected memory errors, 0 corrected"
    assert [gpu.bus for gpu in gpus.inventory(of).gpus] == ["0000:18:00.0", "0000:19:00.0"]
    assert [gpu.uuid for gpu in gpus.inventory(of).gpus] == ["GPU-0", "GPU-1"]


@pytest.mark.parametrize(
    ("check", "changes", "status", "text"),
    [
        ("ecc", {"dram_uncorrectable": "2", "sram_uncorrectable_parity": "1"}, "fail", "3 uncorrected memory error(s)"),
        ("ecc", {"failure": "Yes"}, "fail", "a repair of its memory has failed"),
        ("ecc", {"pending": "Yes"}, "warn", "waits for a reset"),
        ("ecc", {"action": "Node Reboot"}, "warn", "its driver asks for: Node Reboot"),
        ("ecc", {"current_ecc": "Disabled"}, "warn", "error correction is off"),
        ("ecc", {"dram_correctable": "5000"}, "warn", "5000 corrected"),
        ("gpu_memory", {"used": "40000 MiB"}, "fail", "39.1 GiB of 79.6 GiB in use before the job"),
        ("gpu_memory", {"used": "1500 MiB"}, "warn", "1.5 GiB of 79.6 GiB in use"),
        ("gpu_memory", {"total": "40000 MiB"}, "warn", "another GPU here has 79.6 GiB"),
        ("gpu_memory", {"used": "N/A"}, "not checked", "do not tell its memory"),
        ("clocks", {"hw_slowdown": "Active", "hw_thermal_slowdown": "Active"}, "warn", "the hardware slows it down, too hot"),
        ("clocks", {"gpu_temp": "93 C"}, "warn", "93 C before any work"),
        ("clocks", {"max_sm_clock": "1200 MHz"}, "warn", "may reach 1200 MHz, another GPU here 1980"),
        ("foreign_processes", {"processes": process(77, "python", "30000 MiB")}, "fail", "77 (python) uses it with 29.3 GiB"),
        ("foreign_processes", {"processes": process(5, "Xorg", "4 MiB")}, "warn", "process 5 (Xorg) is on it"),
        ("foreign_processes", {"processes": process(77, "", "N/A")}, "fail", "name not visible"),
        ("devices", {"mig": "Enabled"}, "warn", "in MIG mode"),
        ("devices", {"gpu_temp": "GPU is lost"}, "fail", "no answer from it (GPU is lost)"),
        ("devices", {"total": "Unknown Error"}, "fail", "no answer from it (Unknown Error)"),
    ],
)  # fmt: skip
def test_one_of_two_gpus_is_not_well(
    check: str, changes: dict[str, str], status: str, text: str, tmp_path: Path
) -> None:
    results = by_subject(found(check, h100(tmp_path, **changes)))
    assert results["gpu 1"].status == status and text in results["gpu 1"].text
    # The other one is passed, where there is a line for those that are well.
    assert {result.status for subject, result in results.items() if subject != "gpu 1"} <= {"pass"}


def test_no_counts_is_not_checked(tmp_path: Path) -> None:
    """A GPU without error correction, such as one for games, shows N/A everywhere."""
    none = {
        "current_ecc": "N/A",
        "dram_correctable": "N/A",
        "dram_uncorrectable": "N/A",
        "sram_uncorrectable_parity": "N/A",
    }
    text = nvidia(1, **none).replace("<sram_correctable>0", "<sram_correctable>N/A").replace("secded>0", "secded>N/A")
    result = one(devices.CHECKS, "ecc", node(tmp_path, TWO, {"nvidia-smi": text}))
    assert result.status == "not checked" and "show no error counts" in result.text


def test_counts_of_older_gpus(tmp_path: Path) -> None:
    import re

    old = "<volatile><single_bit><total>4</total></single_bit><double_bit><total>9</total></double_bit></volatile>"
    text = re.sub(r"<volatile>.*?</volatile>", old, nvidia(1), flags=re.DOTALL)
    result = found("ecc", node(tmp_path, TWO, {"nvidia-smi": text}))[0]
    assert result.status == "fail" and result.values["corrected"] == 4 and result.values["uncorrected"] == 9


@pytest.mark.parametrize(
    ("expected", "environ", "status", "text"),
    [
        (2, {}, "pass", "2 x"),
        (8, {}, "fail", "8 expected"),
        (1, {}, "warn", "1 expected"),
        (None, {"SLURM_GPUS_ON_NODE": "4"}, "fail", "4 expected"),
        (None, {"SLURM_GPUS_ON_NODE": "gpu:4"}, "pass", "2 x"),
    ],
)
def test_how_many_there_must_be(
    expected: int | None, environ: dict[str, str], status: str, text: str, tmp_path: Path
) -> None:
    of = node(tmp_path, TWO, {"nvidia-smi": nvidia(2)}, expected_gpus=expected, environ=environ)
    of.environ["PATH"] = str(tmp_path / "bin")  # type: ignore[index]
    result = one(devices.CHECKS, "devices", of)
    assert result.status == status and text in result.text


def test_a_gpu_that_has_fallen_off(tmp_path: Path) -> None:
    """On the bus there are three, the driver lists two: perhaps a container was given two."""
    of = node(tmp_path, {**TWO, **pci("0000:20:00.0")}, {"nvidia-smi": nvidia(2)})
    result = one(devices.CHECKS, "devices", of)
    assert result.status == "warn" and "but 3 on the PCI bus" in result.text and "--gpus" in result.text


def test_gpus_of_two_kinds(tmp_path: Path) -> None:
    result = one(devices.CHECKS, "devices", h100(tmp_path, product_name="NVIDIA A100-SXM4-80GB"))
    assert result.status == "warn" and "the slowest will set the pace" in result.text


def test_a_driver_that_fails(tmp_path: Path) -> None:
    broken = '#!/bin/sh\necho "Failed to initialize NVML: Driver/library version mismatch"\nexit 18\n'
    of = node(tmp_path, TWO, {"nvidia-smi": broken})
    result = one(devices.CHECKS, "devices", of)
    assert result.status == "fail"
    assert (
        "2 GPU(s) on the PCI bus; nvidia-smi: ended with 18: Failed to initialize NVML: Driver/library" in result.text
    )
    assert {found(name, of)[0].status for name in NAMES if name != "devices"} == {"not checked"}


def test_a_driver_that_fails_where_there_is_no_gpu(tmp_path: Path) -> None:
    """An image with nvidia-smi on a node without GPUs: no failure, unless GPUs are expected."""
    broken = {"nvidia-smi": "#!/bin/sh\nexit 9\n"}
    assert one(devices.CHECKS, "devices", node(tmp_path, {}, broken)).status == "not checked"
    assert one(devices.CHECKS, "devices", node(tmp_path, {}, broken, expected_gpus=8)).status == "fail"


def test_a_tool_that_prints_nonsense(tmp_path: Path) -> None:
    of = node(tmp_path, TWO, {"nvidia-smi": "no devices <were> found"})
    result = one(devices.CHECKS, "devices", of)
    assert result.status == "fail" and "nvidia-smi prints no XML" in result.text


def test_a_tool_that_hangs(tmp_path: Path) -> None:
    of = node(tmp_path, TWO, {"nvidia-smi": "#!/bin/sh\nexec /bin/sleep 100\n"}, tool_limit=0.3)
    result = one(devices.CHECKS, "devices", of)
    assert result.status == "fail" and "nvidia-smi did not answer within 0.3 s" in result.text


def test_a_kernel_with_another_driver_than_is_installed(tmp_path: Path) -> None:
    loaded = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version:  gcc 12\n"
    of = node(tmp_path, {**TWO, "proc/driver/nvidia/version": loaded}, {"nvidia-smi": nvidia(2)})
    result = one(devices.CHECKS, "driver", of)
    assert result.status == "fail" and "550.54.15" in result.text and "restart the node" in result.text


# ------------------------------------------------------------------------------------------------------------------------- AMD


def amd_smi(name: str = "AMD Instinct MI300X", wrapped: bool = False, count: int = 2, uncorrectable: object = 0) -> str:
    """A tool that answers `static` and `metric` in JSON."""
    static = [{"gpu": n, "asic": {"market_name": name}, "bus": {"bdf": f"0000:{n + 5:02X}:00.0"}} for n in range(count)]
    metric = [
        {
            "gpu": n,
            "ecc": {
                "total_correctable_count": 3,
                "total_uncorrectable_count": uncorrectable,
                "total_deferred_count": 0,
            },
            "mem_usage": {
                "total_vram": {"value": 196592, "unit": "MB"},
                "used_vram": {"value": 283, "unit": "MB"},
            },
        }
        for n in range(count)
    ]
    first, second = (json.dumps({"gpu_data": rows} if wrapped else rows) for rows in (static, metric))
    return f"#!/bin/sh\nif [ \"$1\" = static ]; then echo '{first}'; else echo '{second}'; fi\n"


def test_the_driver_alone_tells_most_of_an_amd_gpu(tmp_path: Path) -> None:
    of = node(tmp_path, mi300x(2))
    assert one(devices.CHECKS, "devices", of).text == "2 x of unknown name (the amdgpu driver)"
    assert one(devices.CHECKS, "gpu_memory", of).text == "192.0 GiB each, at most 300.0 MiB in use"
    assert one(devices.CHECKS, "ecc", of).text == "no uncorrected memory errors, 0 corrected"
    assert one(devices.CHECKS, "clocks", of).text == "up to 2100 MHz, not slowed, at most 41 C"
    assert one(devices.CHECKS, "driver", of).text == "amd driver 6.12.12"
    result = one(devices.CHECKS, "foreign_processes", of)
    assert result.status == "not checked" and result.text == "the tools here do not list processes"


@pytest.mark.parametrize("wrapped", [False, True])
def test_amd_smi_adds_names_and_counts(wrapped: bool, tmp_path: Path) -> None:
    of = node(tmp_path, mi300x(2), {"amd-smi": amd_smi(wrapped=wrapped)})
    assert one(devices.CHECKS, "devices", of).text == "2 x AMD Instinct MI300X (amd-smi)"
    assert one(devices.CHECKS, "ecc", of).text == "no uncorrected memory errors, 6 corrected"


def test_amd_smi_where_the_drivers_files_are_out_of_sight(tmp_path: Path) -> None:
    of = node(tmp_path, {}, {"amd-smi": amd_smi(uncorrectable=2)})
    results = by_subject(found("ecc", of))
    assert results["gpu 1"].status == "fail" and "2 uncorrected" in results["gpu 1"].text
    assert one(devices.CHECKS, "gpu_memory", of).values["gpus"]["0"]["total"] == 196592 << 20


def test_amd_counts_that_are_not_available(tmp_path: Path) -> None:
    """N/A leaves what the driver's files say."""
    files = mi300x(1) | {"sys/bus/pci/devices/0000:05:00.0/ras/gfx_err_count": "ue: 4\nce: 1\n"}
    of = node(tmp_path, files, {"amd-smi": amd_smi(count=1, uncorrectable="N/A")})
    assert "4 uncorrected" in found("ecc", of)[0].text


def test_rocm_smi(tmp_path: Path) -> None:
    cards = {
        f"card{n}": {
            "Card Series": "AMD Instinct MI300X", "PCI Bus": f"0000:{n + 5:02X}:00.0", "VRAM Total Memory (B)": str(192 << 30),
            "VRAM Total Used Memory (B)": str(5 << 30 if n == 10 else 1 << 20),
        }
        for n in range(11)
    }  # fmt: skip
    of = node(tmp_path, {}, {"rocm-smi": json.dumps({**cards, "system": {"Driver version": "6.8.5"}})})
    assert one(devices.CHECKS, "devices", of).text == "11 x AMD Instinct MI300X (rocm-smi)"
    assert one(devices.CHECKS, "driver", of).text == "amd driver 6.8.5"
    assert by_subject(found("gpu_memory", of))["gpu 10"].status == "fail"
    assert {result.status for result in found("ecc", of)} == {"not checked"}


@pytest.mark.parametrize(
    ("file", "text", "status", "said"),
    [
        ("ras/umc_err_count", "ue: 1\nce: 12\n", "fail", "1 uncorrected"),
        (
            "ras/gpu_vram_bad_pages",
            "0x00000001 : 0x00001000 : R\n0x00000002 : 0x00001000 : P\n",
            "warn",
            "1 bad page(s)",
        ),
        ("ras/gpu_vram_bad_pages", "0x00000001 : 0x00001000 : F\n", "fail", "could not be taken out of use"),
    ],
)
def test_faults_that_the_amd_driver_notes(file: str, text: str, status: str, said: str, tmp_path: Path) -> None:
    of = node(tmp_path, mi300x(2) | {f"sys/bus/pci/devices/0000:06:00.0/{file}": text})
    result = by_subject(found("ecc", of))["gpu 1"]
    assert result.status == status and said in result.text


def test_processes_on_amd_gpus(tmp_path: Path) -> None:
    files = {"sys/class/kfd/kfd/proc/4242/vram_1": str(9 << 30), "sys/class/kfd/kfd/proc/4242/vram_2": str(1 << 30)}
    of = node(tmp_path, {**mi300x(2), **files, "proc/4242/comm": "python\n"})
    result = one(devices.CHECKS, "foreign_processes", of)
    assert result.status == "fail" and "process 4242 (python) uses it with 10.0 GiB" in result.text


def test_a_broken_amd_smi_is_told(tmp_path: Path) -> None:
    of = node(tmp_path, mi300x(2), {"amd-smi": '#!/bin/sh\necho "{"\n'})
    results = by_subject(found("devices", of))
    assert results[""].status == "pass" and results["tools"].status == "warn"
    assert "amd-smi prints what this does not understand" in results["tools"].text


# --------------------------------------------------------------------------------------------------------------- without tools


@pytest.mark.parametrize("files", [{}, TWO], ids=["no GPU", "GPUs on the bus"])
def test_without_tools_nothing_passes(files: dict[str, str], tmp_path: Path) -> None:
    of = node(tmp_path, files)
    for name in NAMES:
        results = found(name, of)
        assert {result.status for result in results} == {"not checked"}, name
        assert all(result.text for result in results)
    text = one(devices.CHECKS, "devices", of).text
    assert text.startswith("2 GPU(s) on the PCI bus, but no" if files else "no GPU on the PCI bus, and no")
    assert "no nvidia-smi or amd-smi or rocm-smi is installed" in text


def test_expected_gpus_that_are_not_there_fail(tmp_path: Path) -> None:
    result = one(devices.CHECKS, "devices", node(tmp_path, {}, expected_gpus=8))
    assert result.status == "fail" and "8 GPU(s) expected, none found" in result.text


def test_memory_errors_of_the_host(tmp_path: Path) -> None:
    mc = "sys/devices/system/edac/mc"
    good = {
        f"{mc}/mc0/ce_count": "3\n",
        f"{mc}/mc0/ue_count": "0\n",
        f"{mc}/mc1/ce_count": "0\n",
        f"{mc}/mc1/ue_count": "0\n",
    }
    assert (
        one(devices.CHECKS, "host_ecc", node(tmp_path, good)).text
        == "2 memory controller(s): none uncorrected, 3 corrected"
    )
    bad = by_subject(found("host_ecc", node(tmp_path, {**good, f"{mc}/mc1/ue_count": "1\n"})))
    assert bad["mc1"].status == "fail"
    worn = by_subject(found("host_ecc", node(tmp_path, {**good, f"{mc}/mc0/ce_count": "99999"})))
    assert worn["mc0"].status == "warn"
    assert one(devices.CHECKS, "host_ecc", node(tmp_path / "..", {}, root=tmp_path / "none")).status == "not checked"


# ----------------------------------------------------------------------------------------------------------------------- torch


def torch_says(of: Node, built: dict[str, object] | None, seen: dict[str, object] | None, why: str = "") -> Result:
    stages = {name: told for name, told in (("import", built), ("devices", seen)) if told is not None}
    hung = "devices" if built and seen is None else ""
    of._known["torch"] = Probed(stages, hung, Answer(0, "", "", why))  # type: ignore[arg-type]
    return ask(torch_check.CHECKS, "torch", of)[0]


CUDA = {"version": "2.13.0+cu128", "cuda": "12.8", "hip": None}
SEEN = {
    "devices": [{"name": "H100", "memory": 1, "arch": "sm_90"}] * 2,
    "error": "",
    "nccl": "2.26.2",
    "archs": ["sm_80", "sm_90"],
}


@pytest.mark.parametrize(
    ("built", "seen", "environ", "status", "text"),
    [
        (CUDA, SEEN, {}, "pass", "torch 2.13.0+cu128 with CUDA 12.8, NCCL 2.26.2, sees 2 GPU(s)"),
        (CUDA, {**SEEN, "devices": SEEN["devices"][:1]}, {}, "fail", "sees 1 GPU(s) of 2"),  # type: ignore[index]
        (CUDA, {**SEEN, "devices": SEEN["devices"][:1]}, {"CUDA_VISIBLE_DEVICES": "1"}, "warn", "by CUDA_VISIBLE_DEVICES='1'"),  # type: ignore[index]
        (CUDA, {**SEEN, "devices": []}, {"CUDA_VISIBLE_DEVICES": ""}, "fail", "sees 0 GPU(s) of 2"),
        ({**CUDA, "cuda": None}, {**SEEN, "devices": []}, {}, "fail", "neither CUDA nor ROCm, but there are 2 GPU(s)"),
        ({**CUDA, "cuda": "13.0"}, SEEN, {}, "fail", "the driver serves CUDA 12.8 at most"),
        (CUDA, {**SEEN, "archs": ["sm_70", "sm_80"]}, {}, "fail", "no code for sm_90"),
        (CUDA, {**SEEN, "error": "CUDA error: unknown error"}, {}, "fail", "cannot use the GPUs: CUDA error"),
        (CUDA, None, {}, "fail", "does not come back from listing the GPUs"),
        ({"error": "OSError: libcudart.so.12: cannot open"}, None, {}, "fail", "torch cannot be imported: OSError"),
        ({"error": "ModuleNotFoundError: No module named 'torch'"}, None, {}, "not checked", "torch is not installed"),
        (None, None, {}, "fail", "torch does not start"),
    ],
)  # fmt: skip
def test_torch_beside_the_driver(
    built: dict[str, object] | None, seen: dict[str, object] | None, environ: dict[str, str], status: str, text: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    of = node(tmp_path, TWO, {"nvidia-smi": nvidia(2)})
    of.environ = {**of.environ, **environ}
    result = torch_says(of, built, seen, "python did not answer within 60 s" if seen is None else "")
    assert result.status == status and text in result.text


@pytest.mark.parametrize(
    ("arch", "archs", "served"),
    [
        ("sm_90", ["sm_90"], True), ("sm_89", ["sm_80", "sm_86"], True), ("sm_86", ["sm_89"], False),
        ("sm_90", ["sm_80"], False), ("sm_90", ["sm_80", "compute_80"], True), ("sm_120", ["sm_100"], False),
        ("gfx942", ["gfx90a", "gfx942"], True), ("gfx942", ["gfx90a"], False), ("sm_90", [], True), ("sm_90", ["sm_90a"], True),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_gpu(arch: str, archs: list[str], served: bool) -> None:
    assert torch_check.served(arch, archs) == served
