"""Machines that are not there: trees of /proc and /sys, and tools that print what the real ones print."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.preflight.check import Check, Result
from launch.preflight.node import Node

HERE = Path(__file__).parent
SABOTAGE = (sys.executable, "-P", str(HERE / "sabotage.py"))


def node(
    tmp_path: Path, files: Mapping[str, str] | None = None, tools: Mapping[str, str] | None = None, **more: Any
) -> Node:
    """A node with these files below its root, and with these tools and no others on its PATH.

    tools: what each prints; a text that begins with "#!" is the tool itself.
    """
    root, bin_ = tmp_path / "root", tmp_path / "bin"
    for folder in (root, bin_):
        folder.mkdir(exist_ok=True)
    for name, text in (files or {}).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name, text in (tools or {}).items():
        tool = bin_ / name
        if text.startswith("#!"):
            tool.write_text(text)
        else:
            (bin_ / f"{name}.txt").write_text(text.rstrip("\n") + "\n")
            tool.write_text(f'#!/bin/sh\nwhile IFS= read -r line; do echo "$line"; done < {bin_ / name}.txt\n')
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    known = {"root": root, "environ": {"PATH": str(bin_), **more.pop("environ", {})}, "limit": 30.0, "tool_limit": 10.0}
    return Node(**{**known, **more})


def sabotaged(tmp_path: Path, *faults: str, **more: Any) -> Node:
    """A node whose probes run with faults (sabotage.py), with the real environment."""
    environ = {
        name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    return node(tmp_path, python=(*SABOTAGE, *faults, "--"), environ=environ, folder=tmp_path, **more)


def ask(checks: tuple[Check, ...], name: str, of: Node) -> list[Result]:
    """What one of a module's checks says."""
    (check,) = (check for check in checks if check.name == name)
    return list(check.run(of))


def one(checks: tuple[Check, ...], name: str, of: Node) -> Result:
    (result,) = ask(checks, name, of)
    return result


def by_subject(results: list[Result]) -> dict[str, Result]:
    return {result.subject: result for result in results}


def nvidia(count: int = 2, **changes: str) -> str:
    """The shape of `nvidia-smi -q -x`. changes: element -> text, in the last GPU only."""
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>\n'
        "<driver_version>570.86.15</driver_version>\n<cuda_version>12.8</cuda_version>\n"
        f"<attached_gpus>{count}</attached_gpus>\n"
        + "".join(_nvidia_gpu(index, changes if index == count - 1 else {}) for index in range(count))
        + "</nvidia_smi_log>\n"
    )


def _nvidia_gpu(index: int, changes: Mapping[str, str]) -> str:
    known = {
        "product_name": "NVIDIA H100 80GB HBM3", "total": "81559 MiB", "used": "4 MiB", "current_ecc": "Enabled",
        "dram_correctable": "0", "dram_uncorrectable": "0", "sram_uncorrectable_parity": "0", "pending": "No",
        "failure": "No", "gpu_temp": "31 C", "hw_slowdown": "Not Active", "hw_thermal_slowdown": "Not Active",
        "sm_clock": "345 MHz", "max_sm_clock": "1980 MHz", "processes": "", "action": "None", "mig": "Disabled",
    } | dict(changes)  # fmt: skip
    return f"""<gpu id="00000000:{0x18 + index:02X}:00.0">
 <product_name>{known["product_name"]}</product_name><uuid>GPU-{index}</uuid><mig_mode><current_mig>{known["mig"]}</current_mig></mig_mode>
 <gpu_recovery_action>{known["action"]}</gpu_recovery_action>
 <fb_memory_usage><total>{known["total"]}</total><reserved>551 MiB</reserved><used>{known["used"]}</used></fb_memory_usage>
 <ecc_mode><current_ecc>{known["current_ecc"]}</current_ecc><pending_ecc>Enabled</pending_ecc></ecc_mode>
 <ecc_errors><volatile><sram_correctable>0</sram_correctable>
  <sram_uncorrectable_parity>{known["sram_uncorrectable_parity"]}</sram_uncorrectable_parity>
  <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_correctable>{known["dram_correctable"]}</dram_correctable>
  <dram_uncorrectable>{known["dram_uncorrectable"]}</dram_uncorrectable></volatile>
  <aggregate><sram_correctable>7</sram_correctable><dram_uncorrectable>3</dram_uncorrectable>
  <sram_threshold_exceeded>No</sram_threshold_exceeded></aggregate></ecc_errors>
 <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
 <remapped_rows><remapped_row_corr>0</remapped_row_corr><remapped_row_pending>{known["pending"]}</remapped_row_pending>
  <remapped_row_failure>{known["failure"]}</remapped_row_failure></remapped_rows>
 <temperature><gpu_temp>{known["gpu_temp"]}</gpu_temp><gpu_temp_max_threshold>92 C</gpu_temp_max_threshold></temperature>
 <clocks_event_reasons><clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
  <clocks_event_reason_sw_power_cap>Not Active</clocks_event_reason_sw_power_cap>
  <clocks_event_reason_hw_slowdown>{known["hw_slowdown"]}</clocks_event_reason_hw_slowdown>
  <clocks_event_reason_hw_thermal_slowdown>{known["hw_thermal_slowdown"]}</clocks_event_reason_hw_thermal_slowdown>
 </clocks_event_reasons>
 <clocks><graphics_clock>345 MHz</graphics_clock><sm_clock>{known["sm_clock"]}</sm_clock></clocks>
 <max_clocks><graphics_clock>1980 MHz</graphics_clock><sm_clock>{known["max_sm_clock"]}</sm_clock></max_clocks>
 <processes>{known["processes"]}</processes>
</gpu>
"""


def process(pid: int, name: str, used: str) -> str:
    return (
        f"<process_info><pid>{pid}</pid><type>C</type><process_name>{name}</process_name>"
        f"<used_memory>{used}</used_memory></process_info>"
    )


def pci(bus: str, vendor: str = "0x10de", class_: str = "0x030200", **more: str) -> dict[str, str]:
    """The files of a card on the PCI bus."""
    folder = f"sys/bus/pci/devices/{bus}"
    return {f"{folder}/{name}": text for name, text in {"vendor": vendor, "class": class_, **more}.items()}


def mi300x(count: int = 2) -> dict[str, str]:
    """The amdgpu driver's files for so many GPUs."""
    files = {"sys/module/amdgpu/version": "6.12.12\n"}
    for index in range(count):
        bus = f"0000:{index + 5:02x}:00.0"
        files |= pci(bus, "0x1002", "0x120000", unique_id=f"{index:016x}", mem_info_vram_total=str(192 << 30),
                     mem_info_vram_used=str(300 << 20), pp_dpm_sclk="0: 132Mhz *\n1: 2100Mhz\n")  # fmt: skip
        files |= {
            f"sys/bus/pci/devices/{bus}/ras/{block}_err_count": "ue: 0\nce: 0\n" for block in ("umc", "gfx", "sdma")
        }
        files[f"sys/bus/pci/devices/{bus}/ras/gpu_vram_bad_pages"] = ""
        files[f"sys/bus/pci/devices/{bus}/hwmon/hwmon3/temp2_input"] = "41000\n"
    return files
