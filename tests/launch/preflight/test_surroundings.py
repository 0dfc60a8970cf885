"""Variables that hurt, variables that are advised, versions of packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from launch.preflight import environment, packages, variables
from launch.preflight.check import Result
from tests.launch.preflight.machines import ask, by_subject, mi300x, node, nvidia, one, pci
from tests.launch.preflight.test_gpus import amd_smi

NETS = {f"sys/class/net/{name}/operstate": "up" for name in ("lo", "eth0", "eth1", "ib0")}
CARDS = {f"sys/class/infiniband/mlx5_{n}/ports/1/state": "4: ACTIVE" for n in (0, 1)}
CPUS = {"proc/self/status": "Cpus_allowed_list:\t0-7\n"}


def said(tmp_path: Path, **environ: str) -> dict[str, Result]:
    of = node(tmp_path, {**NETS, **CARDS, **CPUS}, environ=environ)
    return by_subject(ask(environment.CHECKS, "environment", of))


@pytest.mark.parametrize(
    ("setting", "status", "reason"),
    [
        ("NCCL_P2P_DISABLE=1", "warn", "through the host's memory"),
        ("NCCL_IB_DISABLE=1", "warn", "talk by TCP"),
        ("NCCL_ALGO=Ring", "warn", "one choice for all sizes"),
        ("NCCL_IB_TIMEOUT=14", "warn", "4 us x 2^n"),
        ("NCCL_IB_TIMEOUT=many", "warn", "4 us x 2^n"),
        ("NCCL_DEBUG=TRACE", "warn", "a line for each call"),
        ("NCCL_DEBUG_SUBSYS=INIT,COLL", "warn", "a line for each collective"),
        ("RCCL_MSCCL_ENABLE=1", "warn", "gave wrong results"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING=0", "fail", "waiting for ever"),
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "warn", "compare notes"),
        ("CUDA_LAUNCH_BLOCKING=1", "fail", "nothing overlaps"),
        ("AMD_SERIALIZE_KERNEL=3", "fail", "nothing overlaps"),
        ("HSA_ENABLE_SDMA=0", "warn", "compute units"),
        ("HSA_OVERRIDE_GFX_VERSION=9.4.2", "warn", "another architecture"),
        ("CUDA_VISIBLE_DEVICES=", "fail", "hides every GPU"),
        ("ROCR_VISIBLE_DEVICES=-1", "fail", "hides every GPU"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", "fail", "waits for the whole GPU"),
        ("TRITON_INTERPRET=1", "fail", "thousands of times slower"),
        ("OMP_PROC_BIND=true", "warn", "bound to the same CPUs"),
        ("KMP_AFFINITY=granularity=fine,compact", "warn", "bound to the same CPUs"),
        ("PYTHONOPTIMIZE=1", "warn", "assertions"),
        ("BRAID_KERNELS=reference", "warn", "debugging"),
        ("NCCL_SOCKET_IFNAME=enp9", "fail", "there is no enp9 here, but eth0, eth1, ib0, lo"),
        ("NCCL_SOCKET_IFNAME==eth", "fail", "there is no eth here"),
        ("NCCL_SOCKET_IFNAME=eth,enp", "warn", "there is no enp here, only the others"),
        ("NCCL_SOCKET_IFNAME=lo", "warn", "loopback"),
        ("GLOO_SOCKET_IFNAME=eth", "fail", "there is no eth here"),
        ("NCCL_IB_HCA=mlx5_8,mlx5_9", "fail", "there is no mlx5_8, mlx5_9 here"),
        ("NCCL_TOPO_FILE=/nowhere/topo.xml", "fail", "no such file"),
        ("OMP_NUM_THREADS=four", "fail", "is no number of threads"),
        ("OMP_NUM_THREADS=16", "warn", "1 rank(s) with 16 threads each, for 8 CPUs"),
    ],
)  # fmt: skip
def test_a_variable_that_hurts(setting: str, status: str, reason: str, tmp_path: Path) -> None:
    name, _, value = setting.partition("=")
    results = said(tmp_path, **{name: value})
    assert results[setting].status == status and reason in results[setting].text
    assert len(results) == 1


@pytest.mark.parametrize(
    "setting",
    [
        "NCCL_P2P_DISABLE=0", "NCCL_DEBUG=INFO", "NCCL_DEBUG=WARN", "NCCL_DEBUG_SUBSYS=INIT,NET", "NCCL_IB_TIMEOUT=22",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING=3", "NCCL_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth", "NCCL_SOCKET_IFNAME=^docker,lo",
        "NCCL_IB_HCA=mlx5", "NCCL_IB_HCA==mlx5_0:1,mlx5_1:1", "CUDA_VISIBLE_DEVICES=0,1", "OMP_NUM_THREADS=8",
        "OMP_NUM_THREADS=4,2",
        "HSA_ENABLE_SDMA=1", "KMP_AFFINITY=disabled", "NCCL_NVLS_ENABLE=1", "NCCL_MIN_NCHANNELS=112", "OMP_PROC_BIND=false",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8", "NCCL_BUFFSIZE=8388608",
    ],
)  # fmt: skip
def test_a_variable_that_does_not(setting: str, tmp_path: Path) -> None:
    name, _, value = setting.partition("=")
    results = said(tmp_path, **{name: value})
    assert [result.status for result in results.values()] == ["pass"]
    assert results[""].values["set"] == {name: value}  # reported all the same


def test_threads_of_all_ranks_count(tmp_path: Path) -> None:
    results = said(tmp_path, OMP_NUM_THREADS="2", LOCAL_WORLD_SIZE="8")
    assert "8 rank(s) with 2 threads each, for 8 CPUs" in results["OMP_NUM_THREADS=2"].text


def test_another_nccl_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "libnccl.so.2").touch()
    result = said(tmp_path, LD_LIBRARY_PATH=f"/nowhere:{tmp_path}")["LD_LIBRARY_PATH"]
    assert result.status == "warn" and f"{tmp_path}/libnccl.so.2 is loaded in the place of torch's own" in result.text


def test_two_ways_to_choose_among_amd_gpus(tmp_path: Path) -> None:
    of = node(tmp_path, mi300x(2), environ={"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1"})
    results = by_subject(ask(environment.CHECKS, "environment", of))
    assert "set one of them only" in results["HIP_VISIBLE_DEVICES=1 ROCR_VISIBLE_DEVICES=0,1"].text


def test_every_rule_can_speak_and_be_silent() -> None:
    """A rule that objects to everything, or to nothing, is a mistake in the table."""
    values = ("", "0", "1", "true", "false", "trace", "detail", "loc", "socket", "all", "eager", "debug", "reference", "infinite",
              "3", "-1", "close", ":16:8", "99999999", "warn", "none")  # fmt: skip
    for rule in variables.RULES:
        assert rule.names and rule.why and rule.status in ("warn", "fail")
        assert any(rule.bad(value) for value in values), rule.names
        assert not all(rule.bad(value) for value in values), rule.names
        # The families are what is reported and compared between nodes; the rest is the host's.
        host = ("PYTHON", "MALLOC", "LD_", "NVIDIA_")
        assert all(
            variables.FAMILIES.match(name) or name.startswith(("TORCHDYNAMO", "TORCHINDUCTOR", *host))
            for name in rule.names
        )


# ----------------------------------------------------------------------------------------------------------------- recommended


def test_what_the_hardware_file_advises(tmp_path: Path) -> None:
    from pretrain.estimate.hardware import named

    assert one(environment.CHECKS, "recommended", node(tmp_path)).status == "not checked"
    tools = {"amd-smi": amd_smi()}
    results = ask(environment.CHECKS, "recommended", node(tmp_path, mi300x(2), tools))
    assert [r.status for r in results] == ["warn"] and "HSA_NO_SCRATCH_RECLAIM=1" in results[0].text
    hardware = named("AMD Instinct MI300X")
    assert hardware is not None
    of = node(tmp_path, mi300x(2), tools, environ=dict(hardware.environment))
    of.environ = {**of.environ, "PATH": str(tmp_path / "bin")}
    assert [r.status for r in ask(environment.CHECKS, "recommended", of)] == ["pass"]
    of.environ = {**of.environ, "NCCL_MIN_NCHANNELS": "4"}
    (result,) = ask(environment.CHECKS, "recommended", of)
    assert result.status == "warn" and "NCCL_MIN_NCHANNELS=4 (advised: 112)" in result.text


def test_a_gpu_that_no_hardware_file_describes(tmp_path: Path) -> None:
    of = node(tmp_path, pci("0000:18:00.0"), {"nvidia-smi": nvidia(1, product_name="Tesla K80")})
    result = one(environment.CHECKS, "recommended", of)
    assert result.status == "not checked" and "no file for Tesla K80" in result.text


# -------------------------------------------------------------------------------------------------------------------- packages


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key in versions:
            if versions[key] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return str(versions[key])
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_versions_installed_here_fit(tmp_path: Path) -> None:
    results = by_subject(ask(packages.CHECKS, "packages", node(tmp_path)))
    assert not [result for result in results.values() if result.status == "fail"]
    assert "torch" in str(results[""].values["installed"])


@pytest.mark.parametrize(
    ("versions", "name", "status", "text"),
    [
        ({"torch": "2.12.1+cu128"}, "torch", "warn", "2.12.1+cu128, tested with 2.13.0"),
        ({"torch": "2.9.0"}, "torch", "fail", "2.9.0, but this needs >=2.11.0a0"),
        ({"megatron_core": None}, "megatron-core", "fail", "is not installed; tested with 0.16.1: pip install"),
        ({"deepspeed": "0.19.9"}, "deepspeed", "warn", "tested with 0.19.8"),
        ({"triton": None}, "triton", "warn", "is not installed"),
        ({"pydantic": "1.10"}, "pydantic", "fail", "but this needs >=2.10"),
        ({"torch": "unknown"}, "torch", "fail", "unknown"),
    ],
)  # fmt: skip
def test_a_wrong_version(
    versions: dict[str, str | None], name: str, status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, **versions)
    result = by_subject(ask(packages.CHECKS, "packages", node(tmp_path)))[name]
    assert result.status == status and text in result.text


def test_a_local_build_is_the_version_it_is_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, torch="2.13.0+rocm7.1", triton=None, pytorch_triton_rocm="3.7.1+git9")
    results = by_subject(ask(packages.CHECKS, "packages", node(tmp_path)))
    assert "torch" not in results and "triton" not in results
    assert results[""].values["installed"]["triton"] == "3.7.1+git9"


def test_no_list_of_versions(tmp_path: Path) -> None:
    result = one(packages.CHECKS, "packages", node(tmp_path, constraints=tmp_path / "none.txt"))
    assert result.status == "not checked" and "none.txt cannot be read" in result.text


def test_the_tested_versions_are_those_of_the_constraints_file(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# tested\ntorch==9.9.9  # the newest\nnumpy>=1\n\ntriton == 3.7.1 ; python_version > '3'\n")
    results = by_subject(ask(packages.CHECKS, "packages", node(tmp_path, constraints=file)))
    assert "tested with 9.9.9" in results["torch"].text and "triton" not in results
