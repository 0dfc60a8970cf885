"""Environment variables that hurt a training job: a table of what to look for and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from launch.preflight.check import Status

# Every variable with such a name is reported with its value, harmful or not.
FAMILIES = re.compile(
    r"(NCCL|RCCL|TORCH|PYTORCH|CUDA|HIP|HSA|ROCR|ROCBLAS|GPU|AMD|OMP|GOMP|KMP|MKL|GLOO|TRITON|CUBLAS|NVTE|UCX|BRAID)_"
)


class Rule(NamedTuple):
    names: tuple[str, ...]
    bad: Callable[[str], bool]
    status: Status
    why: str


def on(value: str) -> bool:
    """Set to something that programs take as yes."""
    return value.strip().lower() not in ("", "0", "false", "no", "off", "n")


def off(value: str) -> bool:
    return value.strip().lower() in ("0", "false", "no", "off", "n")


def is_(*words: str) -> Callable[[str], bool]:
    return lambda value: value.strip().lower() in words


def below(least: float) -> Callable[[str], bool]:
    def bad(value: str) -> bool:
        try:
            return float(value) < least
        except ValueError:
            return True

    return bad


def above(most: float) -> Callable[[str], bool]:
    def bad(value: str) -> bool:
        try:
            return float(value) > most
        except ValueError:
            return True

    return bad


def present(value: str) -> bool:
    return bool(value.strip())


RULES = (
    # ------------------------------------------------------------------------------- collectives: paths that are closed
    Rule(("NCCL_P2P_DISABLE",), on, "warn", "GPUs of a node talk through the host's memory instead of NVLink or xGMI"),
    Rule(("NCCL_P2P_LEVEL",), is_("loc"), "warn", "GPUs of a node talk through the host's memory instead of NVLink or xGMI"),
    Rule(("NCCL_SHM_DISABLE",), on, "warn", "GPUs without a direct link talk through the network card, or not at all"),
    Rule(("NCCL_IB_DISABLE",), on, "warn", "nodes talk by TCP although there may be InfiniBand or RoCE cards"),
    Rule(("NCCL_NET_GDR_LEVEL",), is_("loc", "0"), "warn", "network cards read GPUs by a detour through the host's memory"),
    Rule(("NCCL_NET",), is_("socket"), "warn", "nodes talk by TCP although there may be InfiniBand or RoCE cards"),
    Rule(("NCCL_NVLS_ENABLE",), off, "warn", "NVSwitches do not add up all-reduces, which costs up to a third of the rate"),
    # ------------------------------------------------------------------------------------ collectives: choices nailed down
    Rule(("NCCL_ALGO", "NCCL_PROTO"), present, "warn", "one choice for all sizes and ops; meant for measuring"),
    Rule(("NCCL_MAX_NCHANNELS", "NCCL_MAX_CTAS"), below(8), "warn", "too few channels to fill the links"),
    Rule(("NCCL_BUFFSIZE",), below(1 << 20), "warn", "buffers below 1 MiB: large messages do not reach the links' rate"),
    Rule(("NCCL_NTHREADS",), below(256), "warn", "too few threads a channel to fill the links"),
    Rule(("NCCL_IB_TIMEOUT",), below(18), "warn", "4 us x 2^n: a link that retrains for a second ends the job; 22 is safe"),
    Rule(("NCCL_IB_RETRY_CNT",), below(7), "warn", "a link that retrains ends the job sooner; 7 is the most"),
    Rule(("RCCL_MSCCL_ENABLE", "RCCL_MSCCLPP_ENABLE"), on, "warn", "replaces RCCL's algorithms by some that gave wrong results"),
    # -------------------------------------------------------------------------------------------- collectives: debugging
    Rule(("NCCL_DEBUG",), is_("trace"), "warn", "a line for each call of each rank"),
    Rule(("NCCL_DEBUG_SUBSYS",), lambda v: bool({"all", "coll", "p2p", "call"} & set(v.lower().split(","))), "warn",
         "a line for each collective of each rank"),
    Rule(("NCCL_CHECK_POINTERS",), on, "warn", "each call looks up its buffers"),
    Rule(("TORCH_DISTRIBUTED_DEBUG",), is_("detail"), "warn", "all ranks compare notes before each collective: far slower"),
    Rule(("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"), on, "warn", "ranks wait for each collective: nothing overlaps"),
    Rule(("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"), off, "fail",
         "a rank that dies leaves the others waiting for ever"),
    Rule(("TORCH_NCCL_DESYNC_DEBUG", "NCCL_DESYNC_DEBUG"), on, "warn", "notes each collective in a store that all ranks share"),
    Rule(("TORCH_NCCL_ENABLE_TIMING",), on, "warn", "two events for each collective; for debugging"),
    # ---------------------------------------------------------------------------------------------------- GPU runtimes
    Rule(("CUDA_LAUNCH_BLOCKING", "HIP_LAUNCH_BLOCKING"), on, "fail", "each kernel is waited for: nothing overlaps"),
    Rule(("AMD_SERIALIZE_KERNEL", "AMD_SERIALIZE_COPY"), on, "fail", "each kernel or copy is waited for: nothing overlaps"),
    Rule(("AMD_LOG_LEVEL",), above(2), "warn", "a line for each call of the runtime"),
    Rule(("HSA_ENABLE_SDMA",), off, "warn", "copies take compute units instead of copy engines"),
    Rule(("HSA_XNACK",), on, "warn", "kernels that can survive page faults are slower"),
    Rule(("HSA_NO_SCRATCH_RECLAIM",), off, "warn", "scratch memory given back between kernels stalls the queue, and RCCL"),
    Rule(("HSA_OVERRIDE_GFX_VERSION",), present, "warn", "kernels of another architecture: slower, or wrong"),
    Rule(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
         lambda v: v.strip() in ("", "-1") or v.lower() == "nodevfiles", "fail", "hides every GPU"),
    Rule(("CUDA_MODULE_LOADING",), is_("eager"), "warn", "loads every kernel of every library: slow starts, less memory"),
    Rule(("CUDA_CACHE_DISABLE",), on, "warn", "kernels are compiled again by each process"),
    Rule(("NVIDIA_TF32_OVERRIDE",), present, "warn", "changes the precision of fp32 products behind the program's back"),
    Rule(("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",), on, "warn", "fp32 products with 10 bits, whatever the configuration says"),
    Rule(("CUBLAS_WORKSPACE_CONFIG",), is_(":16:8"), "warn", "too little room for the fast algorithms; :4096:8 is as repeatable"),
    Rule(("NVTE_ALLOW_NONDETERMINISTIC_ALGO",), off, "warn", "slower attention, for repeatable results"),
    # ------------------------------------------------------------------------------------------------- torch and triton
    Rule(("PYTORCH_NO_CUDA_MEMORY_CACHING",), on, "fail", "each allocation waits for the whole GPU"),
    Rule(("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"), on, "warn", "what is to be compiled runs operator by operator"),
    Rule(("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TRITON_ALWAYS_COMPILE"), on, "warn", "kernels are compiled again at each start"),
    Rule(("TRITON_INTERPRET",), on, "fail", "Triton's kernels run in Python: thousands of times slower"),
    Rule(("BRAID_KERNELS",), is_("reference", "chunked"), "warn", "kernels for debugging instead of the fast ones"),
    Rule(("TORCH_LOGS",), present, "warn", "logs of the compiler; for debugging"),
    # ------------------------------------------------------------------------------------------------- threads and host
    Rule(("OMP_PROC_BIND",), is_("true", "close", "spread", "master", "primary"), "warn",
         "ranks that are not told apart are all bound to the same CPUs"),
    Rule(("GOMP_CPU_AFFINITY", "KMP_AFFINITY"), lambda v: present(v) and v.lower() not in ("none", "disabled"), "warn",
         "all ranks of the node are bound to the same CPUs"),
    Rule(("KMP_BLOCKTIME",), is_("infinite"), "warn", "threads without work keep their CPUs busy"),
    Rule(("PYTHONOPTIMIZE",), on, "warn", "takes the assertions out of the program"),
    Rule(("PYTHONMALLOC",), is_("debug", "malloc_debug", "pymalloc_debug"), "warn", "each allocation of Python is checked"),
    Rule(("MALLOC_PERTURB_", "MALLOC_CHECK_"), on, "warn", "each allocation is checked or filled; for debugging"),
    Rule(("LD_PRELOAD",), present, "warn", "puts other code in the place of libraries, in every process"),
)  # fmt: skip


def harmful(environ: Mapping[str, str]) -> list[tuple[Status, str, str]]:
    """(status, NAME=value, reason) of each variable that a rule objects to, in the order of the rules."""
    return [
        (rule.status, f"{name}={environ[name]}", rule.why)
        for rule in RULES
        for name in rule.names
        if name in environ and rule.bad(environ[name])
    ]
