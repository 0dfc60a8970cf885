"""How fast a folder takes what is written and synced. In a process of its own: a file server that is away holds whoever asks.

    disk.py FOLDER

A script: imports nothing of ours.
"""

import json
import os
import signal
import sys
import time

SMALL = 4096
SECONDS = 1.0  # for the small writes
MOST, LEAST = 500, 5
BLOCK, BLOCKS = 8 << 20, 16


def say(stage: str, **what: object) -> None:
    print(json.dumps({"stage": stage, **what}), flush=True)


def space(folder: str) -> dict[str, object]:
    found = os.statvfs(folder)
    inodes = found.f_favail if found.f_files else None  # some filesystems have no table of them
    return {"free": found.f_bavail * found.f_frsize, "total": found.f_blocks * found.f_frsize, "inodes": inodes}


def sync(folder: str) -> dict[str, object]:
    name = os.path.join(folder, f".preflight_{os.uname().nodename}_{os.getpid()}")  # noqa: PTH118
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.unlink(name)  # noqa: PTH108  now nothing is left behind, however this process ends
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < LEAST or (time.perf_counter() - begun < SECONDS and len(times) < MOST):
            start = time.perf_counter()
            os.pwrite(descriptor, os.urandom(SMALL), len(times) * SMALL)
            os.fsync(descriptor)
            times.append(time.perf_counter() - start)
        block = os.urandom(BLOCK)  # which no filesystem compresses
        start = time.perf_counter()
        for number in range(BLOCKS):
            wrote = os.pwrite(descriptor, block, number * BLOCK)
            if wrote < BLOCK:
                raise OSError(28, "No space left on device")
        os.fsync(descriptor)
        seconds = time.perf_counter() - start
    finally:
        os.close(descriptor)
    times.sort()
    return {
        "syncs": len(times), "median": times[len(times) // 2], "p95": times[int(0.95 * (len(times) - 1))],
        "slowest": times[-1], "bytes": BLOCK * BLOCKS, "rate": BLOCK * BLOCKS / seconds,
    }  # fmt: skip


def main() -> int:
    signal.alarm(3600)  # nothing is left for ever, should whoever waits for this be killed
    folder, *stages = sys.argv[1:]
    for stage in stages:
        say(stage, begun=True)
        try:
            found = space(folder) if stage == "space" else sync(folder)
        except OSError as error:
            found = {"error": error.strerror, "errno": error.errno}
        say(stage, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
