"""Checks of the host: limits, memory, CPUs, NUMA, links, network, clock, kernel log."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.preflight import clock, host, kernel_log, network
from launch.preflight.clock import Kernel
from tests.launch.preflight.machines import ask, by_subject, mi300x, node, nvidia, one, pci

IB = {f"sys/class/infiniband/mlx5_0/ports/1/{name}": text for name, text in {
    "state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand",
    "counters/link_downed": "0",
}.items()}  # fmt: skip
INF = resource.RLIM_INFINITY


def limited(monkeypatch: pytest.MonkeyPatch, **limits: tuple[int, int]) -> None:
    known = {"memlock": (INF, INF), "nofile": (1 << 20, 1 << 20), "nproc": (INF, INF), "core": (0, INF)} | limits
    numbers = {getattr(resource, f"RLIMIT_{name.upper()}"): pair for name, pair in known.items()}
    monkeypatch.setattr(resource, "getrlimit", numbers.__getitem__)


def test_limits_that_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch)
    results = by_subject(ask(host.CHECKS, "limits", node(tmp_path, IB)))
    assert {name: result.text for name, result in results.items()} == {
        "memlock": "memlock unlimited", "nofile": "nofile 1048576", "nproc": "nproc unlimited", "core": "core 0 B",
    }  # fmt: skip
    assert {result.status for result in results.values()} == {"pass"}


@pytest.mark.parametrize(
    ("files", "status", "text"),
    [
        (IB, "fail", "memlock 64.0 KiB: RDMA cards can register no more"),
        (pci("0000:18:00.0"), "warn", "too little once there is an RDMA card"),
        ({}, "pass", "there is no RDMA card that would need more"),
    ],
)
def test_low_memlock(
    files: Mapping[str, str], status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, memlock=(65536, 65536))
    result = by_subject(ask(host.CHECKS, "limits", node(tmp_path, files)))["memlock"]
    assert result.status == status and text in result.text


@pytest.mark.parametrize(
    ("name", "pair", "status", "text"),
    [
        ("nofile", (1024, 1024), "fail", "nofile 1024, better 65536: each"),
        ("nofile", (20000, 1 << 20), "warn", "better 65536 (up to 1048576 without root)"),
        ("nproc", (1000, INF), "fail", "better 32768 (up to unlimited without root)"),
        ("nproc", (5000, 5000), "warn", "better 32768"),
        ("core", (INF, INF), "warn", "core unlimited: each rank that crashes writes its memory to 'core'"),
    ],
)
def test_other_limits(
    name: str, pair: tuple[int, int], status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, **{name: pair})
    result = by_subject(ask(host.CHECKS, "limits", node(tmp_path, {"proc/sys/kernel/core_pattern": "core\n"})))[name]
    assert result.status == status and text in result.text


def test_core_files_that_a_program_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, core=(INF, INF))
    of = node(tmp_path, {"proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P\n"})
    assert by_subject(ask(host.CHECKS, "limits", of))["core"].status == "pass"


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    assert one(host.CHECKS, "shm", node(tmp_path)).status == "fail"  # there is none
    of = node(tmp_path, {"dev/shm/x": ""})
    real = os.statvfs(tmp_path)
    for free, status in ((64 << 20, "fail"), (4 << 30, "warn"), (8 << 30, "pass")):
        found = list(real)
        found[1], found[2], found[4] = 4096, free // 4096, free // 4096
        monkeypatch.setattr(os, "statvfs", lambda path, found=found: os.statvfs_result(found))
        assert one(host.CHECKS, "shm", of).status == status


def meminfo(**gib: float) -> dict[str, str]:
    known = {"MemTotal": 100.0, "MemAvailable": 90.0, "SwapTotal": 8.0, "SwapFree": 8.0} | gib
    return {"proc/meminfo": "".join(f"{name}: {int(count * (1 << 20))} kB\n" for name, count in known.items())}


def test_memory_of_the_host(tmp_path: Path) -> None:
    result = one(host.CHECKS, "host_memory", node(tmp_path, meminfo()))
    assert (result.status, result.text) == ("pass", "90.0 GiB of 100.0 GiB free")
    assert one(host.CHECKS, "host_memory", node(tmp_path, meminfo(MemAvailable=1))).status == "fail"
    swapped = by_subject(ask(host.CHECKS, "host_memory", node(tmp_path, meminfo(SwapFree=3))))
    assert swapped[""].status == "pass" and swapped["swap"].text.startswith("5.0 GiB are swapped out")
    gpus = node(tmp_path, {**meminfo(), **mi300x(2)})
    result = one(host.CHECKS, "host_memory", gpus)
    assert result.status == "warn" and "a copy of what the GPUs hold (384.0 GiB)" in result.text


def test_memory_that_a_container_is_allowed(tmp_path: Path) -> None:
    group = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": str(4 << 30),
             "sys/fs/cgroup/job/memory.current": str(3 << 30), "sys/fs/cgroup/job/step/memory.max": "max\n"}  # fmt: skip
    result = one(host.CHECKS, "host_memory", node(tmp_path, {**meminfo(), **group}))
    assert result.status == "fail" and "4.0 GiB allowed to this job or container, 3.0 GiB of it in use" in result.text


def cpu(**more: str) -> dict[str, str]:
    return {
        "sys/devices/system/cpu/online": "0-7\n",
        "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-3,6\n",
        **more,
    }


def test_cpus(tmp_path: Path) -> None:
    assert one(host.CHECKS, "cpus", node(tmp_path, cpu())).text == "5 of 8 CPUs may be used"
    quota = node(tmp_path, cpu() | {"sys/fs/cgroup/cpu.max": "250000 100000\n"})
    result = one(host.CHECKS, "cpus", quota)
    assert result.status == "warn" and "only 2.5 of them at a time" in result.text
    assert one(host.CHECKS, "cpus", node(tmp_path, cpu() | {"sys/fs/cgroup/cpu.max": "max 100000\n"})).status == "pass"
    many = node(tmp_path, {**cpu(), **mi300x(4), "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"})
    results = by_subject(ask(host.CHECKS, "cpus", many))
    assert "for 4 GPUs" in results[""].text and "powersave" in results["governor"].text
    assert one(host.CHECKS, "cpus", node(tmp_path, root=tmp_path / "none")).status == "not checked"


def numa_files(*gib: float, balancing: str = "0") -> dict[str, str]:
    files = {
        f"sys/devices/system/node/node{n}/meminfo": f"Node {n} MemTotal: {int(size * (1 << 20))} kB\n"
        for n, size in enumerate(gib)
    }
    return {**files, "proc/sys/kernel/numa_balancing": balancing + "\n"}


def test_numa(tmp_path: Path) -> None:
    assert one(host.CHECKS, "numa", node(tmp_path)).status == "not checked"
    assert (
        one(host.CHECKS, "numa", node(tmp_path, numa_files(64, balancing="1"))).status == "pass"
    )  # one node: no matter
    result = one(host.CHECKS, "numa", node(tmp_path, numa_files(64, 64, balancing="1")))
    assert result.status == "warn" and "sysctl kernel.numa_balancing=0" in result.text
    result = one(host.CHECKS, "numa", node(tmp_path, numa_files(64, 64)))
    assert (result.status, result.text) == ("pass", "2 node(s) with 64.0 GiB, 64.0 GiB, balancing off")
    assert by_subject(ask(host.CHECKS, "numa", node(tmp_path, numa_files(64, 32))))["memory"].status == "warn"
    bound = numa_files(64, 64) | {"proc/self/status": "Mems_allowed_list:\t1\n"}
    assert "[1] only" in by_subject(ask(host.CHECKS, "numa", node(tmp_path, bound)))["allowed"].text
    astray = numa_files(64, 64) | {"proc/self/status": ""} | pci("0000:18:00.0", numa_node="-1")
    assert "0000:18:00.0" in by_subject(ask(host.CHECKS, "numa", node(tmp_path, astray)))["gpus"].text


def test_pci_links(tmp_path: Path) -> None:
    assert one(host.CHECKS, "pci", node(tmp_path)).status == "not checked"
    zero = "RxErr 0\nTOTAL_ERR_FATAL 0\n"
    good = pci("0000:18:00.0", current_link_width="16", max_link_width="16", aer_dev_fatal=zero)
    assert one(host.CHECKS, "pci", node(tmp_path, good)).text == "1 card(s) with all their lanes, no uncorrected errors"
    narrow = good | pci("0000:19:00.0", current_link_width="8", max_link_width="16")
    (result,) = ask(host.CHECKS, "pci", node(tmp_path, narrow))
    assert (result.status, result.subject) == ("warn", "gpu at 0000:19:00.0") and "8 lanes, it has 16" in result.text
    broken = good | pci("0000:19:00.0", current_link_width="16", max_link_width="16",
                        aer_dev_fatal="TLP 2\nTOTAL_ERR_FATAL 2\n")  # fmt: skip
    assert ask(host.CHECKS, "pci", node(tmp_path, broken))[0].status == "fail"


@pytest.mark.parametrize(
    ("line", "groups", "status"),
    [("quiet", 1, "warn"), ("quiet iommu=pt", 1, "pass"), ("iommu.passthrough=1", 1, "pass"), ("quiet", 0, "pass")],
)
def test_iommu(line: str, groups: int, status: str, tmp_path: Path) -> None:
    files = mi300x(1) | {"proc/cmdline": line} | {f"sys/kernel/iommu_groups/{n}/type": "DMA" for n in range(groups)}
    assert one(host.CHECKS, "iommu", node(tmp_path, files)).status == status


def test_iommu_matters_for_amd_only(tmp_path: Path) -> None:
    assert (
        one(host.CHECKS, "iommu", node(tmp_path, {"proc/cmdline": "", **pci("0000:18:00.0")})).status == "not checked"
    )


def test_lists_of_the_kernel() -> None:
    assert host.members("0-3,8,10-11\n".strip()) == {0, 1, 2, 3, 8, 10, 11} and host.members("") == set()


# --------------------------------------------------------------------------------------------------------------------- network


def nic(name: str, **changes: str) -> dict[str, str]:
    known = {"device/vendor": "0x15b3", "operstate": "up", "speed": "100000", "mtu": "9000", "carrier": "1",
             "carrier_changes": "2", "statistics/rx_errors": "0", "statistics/tx_errors": "0",
             "statistics/rx_packets": "1000000", "statistics/tx_packets": "1000000"} | changes  # fmt: skip
    return {f"sys/class/net/{name}/{key}": text for key, text in known.items()}


def test_network_cards(tmp_path: Path) -> None:
    of = node(tmp_path, {"sys/class/net/lo/operstate": "unknown"})
    result = one(network.CHECKS, "nics", of)
    assert result.status == "not checked" and "no network card" in result.text
    files = nic("eth0") | nic("eth1", operstate="down", carrier="0") | nic("eth2", **{"statistics/rx_errors": "5000"})
    files |= nic("eth3", carrier_changes="41")
    results = by_subject(ask(network.CHECKS, "nics", node(tmp_path, files)))
    assert (results["eth0"].status, results["eth0"].text) == ("pass", "up 100 Gbit/s, MTU 9000")
    assert results["eth1"].status == "warn" and "no link" in results["eth1"].text
    assert "5000 broken packets of 2000000" in results["eth2"].text
    assert "came or went 41 times" in results["eth3"].text and "" not in results


def test_a_node_without_any_link(tmp_path: Path) -> None:
    results = by_subject(ask(network.CHECKS, "nics", node(tmp_path, nic("eth0", operstate="down", carrier="0"))))
    assert results[""].status == "fail"


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "pass", "ACTIVE, LinkUp, 400 Gb/sec (4X NDR), InfiniBand"),
        ({"state": "1: DOWN", "phys_state": "3: Disabled"}, "fail", "DOWN, Disabled"),
        ({"state": "2: INIT"}, "fail", "INIT, LinkUp"),
        ({"counters/link_downed": "7"}, "warn", "link_downed 7"),
        ({"link_layer": "Ethernet"}, "fail", "no RoCE v2 address"),
        ({"link_layer": "Ethernet", "gid_attrs/types/0": "IB/RoCE v1\n", "gids/0": "fe80::1"}, "fail", "no RoCE v2"),
        ({"link_layer": "Ethernet", "gid_attrs/types/3": "RoCE v2\n", "gids/3": "0000:0000::ffff:0a00:0001"}, "pass", "Ethernet"),
        ({"link_layer": "Ethernet", "gid_attrs/types/3": "RoCE v2\n", "gids/3": "0000:0000:0000:0000"}, "fail", "no RoCE v2"),
    ],
)  # fmt: skip
def test_rdma_ports(changes: dict[str, str], status: str, text: str, tmp_path: Path) -> None:
    port = "sys/class/infiniband/mlx5_0/ports/1"
    of = node(tmp_path, IB | {f"{port}/{name}": content for name, content in changes.items()})
    (result,) = ask(network.CHECKS, "rdma", of)
    assert (result.status, result.subject) == (status, "mlx5_0:1") and text in result.text


def test_rdma_ports_of_several_rates(tmp_path: Path) -> None:
    slow = {name.replace("mlx5_0", "mlx5_1"): text for name, text in IB.items()}
    slow["sys/class/infiniband/mlx5_1/ports/1/rate"] = "200 Gb/sec (4X HDR)"
    results = by_subject(ask(network.CHECKS, "rdma", node(tmp_path, IB | slow)))
    assert results["rates"].status == "warn" and "mlx5_1:1 200 Gb/sec" in results["rates"].text
    assert one(network.CHECKS, "rdma", node(tmp_path, root=tmp_path / "none")).status == "not checked"


# ----------------------------------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("kernel", "service", "status", "text"),
    [
        (Kernel(True, 0.002), None, "pass", "by the kernel's flag; off by 0.002 s at most"),
        (Kernel(False, 16.0), None, "warn", "not synchronised, by the kernel"),
        (Kernel(False, 16.0), "yes", "pass", "by timedatectl"),
        (None, "no", "warn", "not synchronised, by timedatectl"),
        (None, None, "not checked", "timedatectl is not installed"),
        (None, "#!/bin/sh\necho 'System has not been booted with systemd' >&2\nexit 1\n", "not checked", "has not been booted"),
    ],
)  # fmt: skip
def test_the_clock(kernel: Kernel | None, service: str | None, status: str, text: str, tmp_path: Path) -> None:
    of = node(tmp_path, {}, {} if service is None else {"timedatectl": service})
    (result,) = clock.clock(of, ask=lambda: kernel)
    assert result.status == status and text in result.text


def test_a_clock_without_a_battery(tmp_path: Path) -> None:
    (result,) = clock.clock(node(tmp_path), now=lambda: 86400.0)
    assert result.status == "fail" and "1970-01-02" in result.text


def test_the_kernels_own_clock_can_be_asked() -> None:
    found = clock.kernel()
    assert found is not None and found.error >= 0.0


# ------------------------------------------------------------------------------------------------------------------ kernel log

XID = "NVRM: Xid (PCI:0000:18:00): 79, pid=77, name=python, GPU has fallen off the bus."


@pytest.mark.parametrize(
    ("line", "status", "meaning"),
    [
        (XID, "fail", "Xid 79 of the GPU at 0000:18:00, it has fallen off the bus"),
        ("NVRM: Xid (PCI:0000:18:00): 63, pid=1, Row Remapper: New row marked", "warn", "Xid 63"),
        ("NVRM: Xid (PCI:0000:18:00): 94, pid=1, Contained: SM", "warn", "stayed within one program"),
        ("NVRM: Xid (PCI:0000:18:00): 777, something new", "warn", "see NVIDIA's list"),
        ("amdgpu 0000:05:00.0: amdgpu: 1 uncorrectable hardware errors detected in umc block", "fail", "uncorrected error"),
        ("amdgpu 0000:05:00.0: amdgpu: 4 correctable hardware errors detected in umc block", "warn", "corrected error of an AMD"),
        ("amdgpu 0000:05:00.0: amdgpu: GPU reset begin!", "fail", "hung or was reset"),
        ("[drm:amdgpu_job_timedout [amdgpu]] *ERROR* amdgpu ring sdma0 timeout, signaled seq=5", "fail", "hung or was reset"),
        ("pcieport 0000:00:01.0: AER: Uncorrectable (Fatal) error message received", "fail", "uncorrected PCIe"),
        ("pcieport 0000:00:01.0: PCIe Bus Error: severity=Corrected, type=Data Link Layer", "warn", "corrected PCIe"),
        ("EDAC MC0: 1 UE memory read error on CPU_SrcID#0_MC#0", "fail", "uncorrected memory error"),
        ("EDAC MC0: 3 CE memory read error on CPU_SrcID#0_MC#0", "warn", "corrected memory error"),
        ("mce: [Hardware Error]: Machine check events logged", "warn", "hardware error of the host"),
        ("mlx5_core 0000:4b:00.0 eth2: Link down", "warn", "a network link went down"),
        ("bnxt_en 0000:18:00.0 ens1: NIC Link is Down", "warn", "a network link went down"),
        ("NETDEV WATCHDOG: eth0 (mlx5_core): transmit queue 3 timed out", "fail", "a network card hung"),
        ("nvme nvme0: controller is down; will reset: CSTS=0xffffffff", "fail", "error of a disk"),
        ("EXT4-fs error (device sda1): ext4_lookup:1234", "fail", "damaged filesystem"),
        ("nfs: server filer1 not responding, still trying", "warn", "a file server was away"),
        ("Out of memory: Killed process 1234 (python)", "warn", "a process was killed"),
        ("INFO: task python:99 blocked for more than 120 seconds.", "warn", "hung inside the kernel"),
        ("watchdog: BUG: soft lockup - CPU#3 stuck for 22s!", "fail", "the kernel is unwell"),
    ],
)  # fmt: skip
def test_what_lines_of_the_kernel_mean(line: str, status: str, meaning: str) -> None:
    found = kernel_log.judge(line)
    assert found is not None and found[0] == status and meaning in found[1]


@pytest.mark.parametrize(
    "line",
    [
        "Linux version 6.18.44", "EDAC MC: Ver: 3.0.0", "nvme nvme0: 8/0/0 default/read/poll queues",
        "mlx5_core 0000:4b:00.0: Link up", "amdgpu 0000:05:00.0: amdgpu: RAS: optional ras ta ucode is not available",
        "pcieport 0000:00:1c.0: AER: enabled with IRQ 122", "EXT4-fs (vda): mounted filesystem with ordered data mode",
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15", "mce: CPU0: Thermal monitoring enabled (TM1)",
        "ACPI: PM: (supports S0 S5)", "systemd[1]: Started journal", "MCE: In-kernel MCE decoding enabled.",
        "ice 0000:18:00.0: The DDP package was successfully loaded", "RAS: Correctable Errors collector initialized.",
    ],
)  # fmt: skip
def test_ordinary_lines_mean_nothing(line: str) -> None:
    assert kernel_log.judge(line) is None


def kmsg(*lines: tuple[float, str]) -> dict[str, str]:
    records = "".join(f"6,{n},{int(1e6 * when)},-;{text}\n SUBSYSTEM=pci\n" for n, (when, text) in enumerate(lines))
    return {"dev/kmsg": records, "proc/uptime": "10000.00 5000.00\n"}


def test_recent_errors_count_and_old_ones_do_not(tmp_path: Path) -> None:
    of = node(
        tmp_path,
        kmsg((100.0, XID), (9000.0, "EDAC MC0: 1 CE on x"), (9990.0, "EDAC MC0: 2 CE on x"), (9999.0, "hello")),
    )
    result = one(kernel_log.CHECKS, "kernel_log", of)
    assert result.status == "warn" and result.text == (
        "corrected memory error: 2 line(s), the last 0 min ago: EDAC MC0: 2 CE on x"
    )
    of.since = 1000.0
    assert [r.status for r in ask(kernel_log.CHECKS, "kernel_log", of)] == ["fail", "warn"]
    assert one(kernel_log.CHECKS, "kernel_log", node(tmp_path, kmsg((9000.0, "hello")))).status == "pass"


def test_other_ways_to_the_log(tmp_path: Path) -> None:
    files = {"proc/uptime": "10000 1\n"}
    of = node(tmp_path, files)
    result = one(kernel_log.CHECKS, "kernel_log", of)
    assert result.status == "not checked"
    assert "No such file" in result.text and "dmesg is not installed" in result.text and "journalctl is" in result.text
    refused = {"dmesg": "#!/bin/sh\necho 'dmesg: read kernel buffer failed: Operation not permitted' >&2\nexit 1\n"}
    assert "Operation not permitted" in one(kernel_log.CHECKS, "kernel_log", node(tmp_path, files, refused)).text
    journal = {"journalctl": f"[ 9999.123456] n1 kernel: {XID}\n"}
    assert one(kernel_log.CHECKS, "kernel_log", node(tmp_path, files, {**refused, **journal})).status == "fail"
    dmesg = {"dmesg": f"[    1.000000] hello\n[ 9999.123456] {XID}\n"}
    assert one(kernel_log.CHECKS, "kernel_log", node(tmp_path, files, dmesg)).status == "fail"


def test_without_any_tree_or_tool_nothing_of_this_passes_for_want_of_evidence(tmp_path: Path) -> None:
    of = node(tmp_path, root=tmp_path / "none")
    checked = {c.name: {r.status for r in c.run(of)} for c in (*host.CHECKS, *network.CHECKS, *kernel_log.CHECKS)}
    checked.pop("limits")  # which every process can ask of itself
    assert checked.pop("shm") == {"fail"}  # a node without it cannot train
    assert set().union(*checked.values()) == {"not checked"}


def test_gpus_of_nvidia_do_not_change_what_is_asked_of_the_host(tmp_path: Path) -> None:
    of = node(tmp_path, meminfo(MemAvailable=99, MemTotal=200), {"nvidia-smi": nvidia(1)})
    assert one(host.CHECKS, "host_memory", of).status == "pass"
