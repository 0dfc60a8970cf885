"""One device at work: products with a known result, the same product again, and memory that is written and read back.

    device.py cpu|cuda BYTES STAGE...       BYTES: to write and read back; 0: four fifths of what is free on a GPU

A script of its own, so that a device that hangs takes nothing else with it. It imports nothing of ours.
"""

import contextlib
import json
import signal
import sys
import time

import torch

HOST_BYTES = 256 << 20
SHARE = 0.8
SLICE = 1 << 24  # words that are looked at together
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # spreads neighbouring addresses over all 64 bits


def say(stage: str, **what: object) -> None:
    print(json.dumps({"stage": stage, **what}), flush=True)


def matmul(device: torch.device) -> dict[str, object]:
    """Two kinds of evidence: a result known beforehand (exact), and the same bits each time (repeatable)."""
    gpu = device.type == "cuda"
    rows, inner, repeats = (4096, 2048, 30) if gpu else (512, 1024, 4)
    found: dict[str, object] = {"rows": rows, "inner": inner, "wrong_rows": 0, "different": 0, "finite": True}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, shape, generator=generator) for shape in ((rows, inner), (inner, rows)))
    # Sums of `inner` terms from {-1, 0, 1} stay far below 256: exact in bf16 and in fp32, in whatever order they are added.
    # So c x = a (b x), in whole numbers, and for a random x it almost never holds by chance (Freivalds).
    x = torch.randint(0, 1 << 20, (rows, 1), generator=generator).double()
    expected = a.double() @ (b.double() @ x)
    for dtype in (torch.bfloat16, torch.float32):
        c = torch.mm(a.to(device, dtype), b.to(device, dtype)).double().cpu()
        found["wrong_rows"] += int((c @ x != expected).sum())  # type: ignore[operator]
    a, b = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((rows, inner), (inner, rows))
    )
    first = torch.mm(a, b)
    found["finite"] = bool(first.isfinite().all())
    best = float("inf")
    for _ in range(repeats):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        again = torch.mm(a, b)
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        found["different"] += int((again.view(torch.int16) != first.view(torch.int16)).sum())  # type: ignore[operator]
    found["tflops"] = 2.0 * rows * rows * inner / best / 1e12
    found["repeats"] = repeats
    return found


def memory(device: torch.device, size: int) -> dict[str, object]:
    """Every bit of `size` bytes as 0 and as 1, beside equal and unequal neighbours, and each word with a value of its own."""
    if not size:
        size = int(SHARE * torch.cuda.mem_get_info()[0]) if device.type == "cuda" else HOST_BYTES
    words = max(1024, size // 8)
    taken = torch.empty(words, dtype=torch.int64, device=device)
    wrong = 0
    place: int | None = None
    patterns = [0, -1, 0x5555555555555555, -0x5555555555555556, None]
    for pattern in patterns:
        # All is written before any is read: two addresses that reach the same cell would otherwise go unseen.
        for start in range(0, words, SLICE):
            part = taken[start : start + SLICE]
            part.copy_(addresses(start, part)) if pattern is None else part.fill_(pattern)
        for start in range(0, words, SLICE):
            part = taken[start : start + SLICE]
            bad = part != (addresses(start, part) if pattern is None else pattern)
            count = int(bad.sum())
            if count and place is None:
                place = 8 * (start + int(bad.nonzero()[0]))
            wrong += count
    return {"bytes": 8 * words, "patterns": len(patterns), "wrong_words": wrong, "first_wrong": place}


def addresses(start: int, part: torch.Tensor) -> torch.Tensor:
    """A value for each word of a part that begins at word `start`, no two of them the same."""
    return torch.arange(start, start + len(part), dtype=torch.int64, device=part.device) * ODD


def main() -> int:
    signal.alarm(3600)  # nothing is left for ever, should whoever waits for this be killed
    kind, size, *stages = sys.argv[1:]
    say("start", begun=True)
    device = torch.device(kind)
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(min(8, torch.get_num_threads()))
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        say("start", error=str(error).splitlines()[0][:300])
        return 0
    say("start", name=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    for stage in stages:
        say(stage, begun=True)
        begun = time.monotonic()
        try:
            found = matmul(device) if stage == "matmul" else memory(device, int(size))
        except Exception as error:  # out of memory, an illegal address, a kernel that this build does not have
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        say(stage, seconds=round(time.monotonic() - begun, 3), **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
