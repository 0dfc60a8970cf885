"""The run folder's disk: room, and how fast it makes what is written safe (probes/disk.py)."""

from __future__ import annotations

import errno
from pathlib import Path

from launch.preflight.check import Check, Result, failed, passed, size, warned
from launch.preflight.node import Node, Probed

SLOW_SYNC, HOPELESS_SYNC = 0.1, 1.0  # seconds for 4 KiB; a disk needs 0.02, a file server 0.01, flash 0.001
SLOW_WRITE = 100e6  # bytes a second
FEW_INODES = 10_000
VANISHES = {
    "tmpfs": "in memory: it is gone with the node",
    "ramfs": "in memory: it is gone with the node",
    "overlay": "a container's own layer: it is gone with the container",
}


def disk_space(node: Node) -> list[Result]:
    folder, probed = _probe(node, "space")
    if (bad := _trouble(probed, "space", folder)) is not None:
        return [bad]
    found = probed.stages["space"]
    kind = filesystem(node, folder)
    text = f"{size(found['free'])} of {size(found['total'])} free in {folder}" + (f" ({kind})" if kind else "")
    values = {**found, "folder": str(folder), "filesystem": kind}
    results = []
    if found["free"] < node.free:
        results.append(failed(f"{text}; at least {size(node.free)} wanted (--free)", **values))
    if found["inodes"] is not None and found["inodes"] < FEW_INODES:
        results.append(
            failed(f"room for {found['inodes']} more files in {folder}: checkpoints have many", "inodes", **values)
        )
    if kind in VANISHES:
        results.append(warned(f"{text}: {VANISHES[kind]}", **values))
    return results or [passed(text, **values)]


def disk_sync(node: Node) -> list[Result]:
    folder, probed = _probe(node, "sync")
    if (bad := _trouble(probed, "sync", folder)) is not None:
        return [bad]
    found = probed.stages["sync"]
    median, p95 = 1e3 * found["median"], 1e3 * found["p95"]
    text = f"{1e3 / median:,.0f} fsyncs/s of 4 KiB ({median:.3g} ms, 95 % within {p95:.3g} ms)"
    text += f", {found['rate'] / 1e6:,.0f} MB/s written and synced in {folder}"
    if found["median"] >= HOPELESS_SYNC:
        return [failed(f"{text}: each save waits for dozens of these", **found)]
    if found["median"] >= SLOW_SYNC:
        return [warned(f"{text}: each save waits for dozens of these", **found)]
    if found["rate"] < SLOW_WRITE:
        return [warned(f"{text}: {100e9 / found['rate'] / 60:.0f} minutes for a checkpoint of 100 GB", **found)]
    return [passed(text, **found)]


def _probe(node: Node, stage: str) -> tuple[Path, Probed]:
    """The run folder, or the nearest one above it that is there, and what came of it."""
    asked = str(node.folder.absolute())
    # Looking for the folder may hang as well: not here, but in a process.
    answer = node.once("folder", lambda: node.tools.run([*node.python, "-c", NEAREST, asked], node.limit, node.environ))
    folder = Path(answer.out.strip() or asked)
    return folder, node.probe("disk", str(folder), stage) if answer.ok else Probed({}, "", answer)


NEAREST = """
import os, sys
p = sys.argv[1]
while not os.path.isdir(p):
    if os.path.exists(p):
        sys.exit(f"{p} is not a folder")
    p = os.path.dirname(p)
print(p)
"""


def _trouble(probed: Probed, stage: str, folder: Path) -> Result | None:
    if stage in probed.stages:
        found = probed.stages[stage]
        if "error" not in found:
            return None
        if found.get("errno") in (errno.EACCES, errno.EPERM, errno.EROFS):
            return failed(f"{folder} cannot be written: {found['error']}", **found)
        return failed(f"{folder}: {found['error']}", **found)
    if probed.answer.trouble:
        return failed(f"{folder} hangs: no answer within the time limit; is its file server away?")
    said = probed.answer.err.strip()
    return failed(said if said.endswith("is not a folder") else f"{folder}: {probed.answer.why}")


def filesystem(node: Node, folder: Path) -> str:
    """The kind of filesystem that a folder is on, by the longest mount point above it."""
    best, kind = -1, ""
    for line in (node.read("proc/self/mounts") or node.read("proc/mounts") or "").splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = Path(words[1].replace("\\040", " "))
        if (point == folder or point in folder.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), words[2]
    return kind


CHECKS = (
    Check("disk_space", "room and kind of the filesystem that the run folder is on", disk_space),
    Check("disk_sync", "fsyncs a second and synced MB/s in the run folder", disk_sync),
)
