"""Each device at work for a moment, in a process of its own (probes/device.py)."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping
from typing import NamedTuple

from launch.preflight.check import Check, Result, failed, not_checked, passed, size, warned
from launch.preflight.gpus import inventory, none_found
from launch.preflight.node import Node, Probed

STAGES = ("matmul", "memory")
SLOW = 0.8  # of the median of this node's GPUs
STEADY = {
    # Sums by atomic additions come out differently each time on a healthy device: rocBLAS uses them unless told not to, cuBLAS
    # may split a sum among streams.
    "ROCBLAS_DEFAULT_ATOMICS_MODE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


class Slot(NamedTuple):
    """A device for a process that sees no other: one GPU that hangs must not stop the process that tests another."""

    subject: str
    kind: str
    environ: Mapping[str, str]


def slots(node: Node) -> list[Slot]:
    """The CPU, and every GPU that this environment lets a job see."""
    found = inventory(node)
    seen = node.torch().stages
    amd = bool(seen.get("import", {}).get("hip")) or any(gpu.vendor == "amd" for gpu in found.gpus)
    name = "HIP_VISIBLE_DEVICES" if amd else "CUDA_VISIBLE_DEVICES"
    given = (
        node.environ.get(name) if name in node.environ else node.environ.get("CUDA_VISIBLE_DEVICES") if amd else None
    )
    count = len(found.gpus) or len(seen.get("devices", {}).get("devices", []))
    if amd and given is None and "ROCR_VISIBLE_DEVICES" in node.environ:  # as Slurm sets it; HIP counts what it leaves
        count = len(_parts(node.environ["ROCR_VISIBLE_DEVICES"]))
    labels = _parts(given) if given is not None else [str(index) for index in range(count)]
    cpu = Slot("cpu", "cpu", {**STEADY, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    # By the bus, as nvidia-smi counts; CUDA's own order puts the fastest first.
    order = {**STEADY, "CUDA_DEVICE_ORDER": node.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    return [cpu, *(Slot(f"gpu {label}", "cuda", {**order, name: label}) for label in labels)]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip() not in ("", "-1")]


def work(node: Node, stages: tuple[str, ...] = STAGES) -> dict[str, Probed]:
    """What came of it on each device. All at the same time, as in training."""

    def all_of_them() -> dict[str, Probed]:
        results: dict[str, Probed] = {}

        def one(slot: Slot) -> None:
            results[slot.subject] = node.probe(
                "device", slot.kind, str(node.memory or 0), *stages, environ=slot.environ
            )

        found = slots(node)
        threads = [threading.Thread(target=one, args=(slot,), daemon=True) for slot in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {slot.subject: results[slot.subject] for slot in found if slot.subject in results}

    return node.once("work " + " ".join(stages), all_of_them)


def matmul(node: Node) -> list[Result]:
    results = []
    speeds: dict[str, float] = {}
    for subject, probed in work(node, node.stages).items():
        if (bad := _trouble("matmul", subject, probed)) is not None:
            results.append(bad)
            continue
        found = probed.stages["matmul"]
        if found["wrong_rows"]:
            text = f"{found['wrong_rows']} row(s) of products with a known result are wrong: do not train on this"
            results.append(failed(text, subject, **found))
        elif not found["finite"]:
            results.append(failed("a product of finite matrices is not finite: do not train on this", subject, **found))
        elif found["different"]:
            text = f"the same product differs in {found['different']} place(s) from one time to the next: do not train on this"
            results.append(failed(text, subject, **found))
        else:
            speeds[subject] = found["tflops"]
            text = f"exact, and the same bits {found['repeats']} times; {found['tflops']:.3g} TFLOP/s in bf16"
            results.append(passed(text, subject, **found))
    return [*_slower(results, speeds), *_no_gpu(node)]


def _slower(results: list[Result], speeds: dict[str, float]) -> list[Result]:
    """The same results, where a GPU that lags behind the others is not passed."""
    gpus = {subject: speed for subject, speed in speeds.items() if subject != "cpu"}
    if len(gpus) < 3:
        return results
    median = statistics.median(gpus.values())
    return [
        warned(f"{gpus[r.subject]:.3g} TFLOP/s, where the median of this node is {median:.3g}", r.subject, **r.values)
        if r.status == "pass" and r.subject in gpus and gpus[r.subject] < SLOW * median
        else r
        for r in results
    ]


def memory_test(node: Node) -> list[Result]:
    results = []
    for subject, probed in work(node, node.stages).items():
        if (bad := _trouble("memory", subject, probed)) is not None:
            results.append(bad)
            continue
        found = probed.stages["memory"]
        if found["wrong_words"]:
            text = f"{found['wrong_words']} word(s) came back changed, the first at byte {found['first_wrong']:,}: replace it"
            results.append(failed(text, subject, **found))
        else:
            results.append(passed(f"{size(found['bytes'])} kept {found['patterns']} patterns", subject, **found))
    return [*results, *_no_gpu(node)]


def _trouble(stage: str, subject: str, probed: Probed) -> Result | None:
    """Why a stage has no result, if it has none."""
    start = probed.stages.get("start", {})
    if "error" in start:
        return failed(f"cannot be used: {start['error']}", subject)
    if stage in probed.stages:
        error = probed.stages[stage].get("error")
        return None if error is None else failed(error, subject)
    if probed.hung_in in (stage, "start"):
        where = "being woken" if probed.hung_in == "start" else stage
        return failed(f"in {where}: the process that uses it {_how(probed)}", subject)
    if probed.hung_in:
        return not_checked(f"the process that uses it has not come past {probed.hung_in}", subject)
    if "No module named 'torch'" in probed.answer.err:
        return not_checked("torch is not installed in this environment", subject)
    return failed(f"the process that uses it {_how(probed)}", subject)


def _how(probed: Probed) -> str:
    trouble = probed.answer.trouble
    return trouble.partition(" ")[2] if " did not answer" in trouble else probed.answer.why


def _no_gpu(node: Node) -> list[Result]:
    if len(slots(node)) > 1:
        return []
    hidden = "" if not inventory(node).gpus else "the environment lets a job see no GPU"
    return [not_checked(hidden or none_found(node), "gpu")]


CHECKS = (
    Check(
        "matmul",
        "products with a known result, and the same product again, bit by bit, on the CPU and each GPU",
        matmul,
    ),
    Check("memory_test", "patterns written to and read back from memory of the CPU and of each GPU", memory_test),
)
STAGE_OF = {"matmul": "matmul", "memory_test": "memory"}
