"""Ranks in networks of their own, with links of known rate and delay: run as `unshare -Urn python shaped.py two|four FILE ...`.

Rates are set by tc (tbf, htb). Delays too where the kernel has netem; where it has not, packets wait in a process between the two
networks. Prints one line of JSON: how the delay was made. The ranks run `parallel.bench pairs`, which writes FILE.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from parallel.bench import pairs

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET, PR_SET_PDEATHSIG = 0x40000000, 1
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
MTU = 4000  # few packets for the process between, and a bucket of tokens that is small beside the delay
PORT = 29533


class Rank:
    """A forked process in a network of its own, which runs the benchmark when told to."""

    def __init__(self, rank: int, world: int, device: str, arguments: Sequence[str]):
        self.rank, self.device = rank, device
        ready, told = os.pipe()
        wait, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(self.go)
            code = 1
            try:
                if LIBC.unshare(CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "unshare")
                os.write(told, b"1")
                if os.read(wait, 1):
                    code = self.run(world, arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(told)
        os.close(wait)
        assert os.read(ready, 1) == b"1"

    def run(self, world: int, arguments: Sequence[str]) -> int:
        # A connection that was idle would begin slowly again, as if it knew nothing of the link.
        Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text("0")
        for way in ("tcp_rmem", "tcp_wmem"):  # as much as is under way on a long link, from the beginning
            Path("/proc/sys/net/ipv4", way).write_text("4096 4194304 4194304")
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "10.9.0.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": self.device}
        return pairs.main(arguments)

    def ip(self, *arguments: str) -> None:
        self.command("ip", *arguments)

    def command(self, *arguments: str) -> None:
        command("nsenter", "-t", str(self.pid), "-n", *arguments)

    def up(self) -> None:
        self.ip("link", "set", "lo", "up")
        self.ip("addr", "add", f"10.9.0.{self.rank + 1}/24", "dev", self.device)
        self.ip("link", "set", self.device, "up")
        window = ("initcwnd", "200", "initrwnd", "200")  # or the first messages would wait for the window to open
        self.ip("route", "change", "10.9.0.0/24", "dev", self.device, "src", f"10.9.0.{self.rank + 1}", *window)


def command(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()}")


def run(ranks: Sequence[Rank], extra: Sequence[int] = ()) -> int:
    """Starts all ranks; their worst exit code. extra: helpers, which must outlive the ranks."""
    for rank in ranks:
        os.write(rank.go, b"1")
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1]) for rank in ranks]
    for pid in extra:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return max(abs(code) for code in codes)


# ---------------------------------------------------------------------------------------- two ranks, a link with a delay


def two(file: str, mbit: int, milliseconds: float) -> int:
    arguments = ["--sizes", "8,64K,128K,256K,512K,1M", "--seconds", "0.1", "--json", file, "--timeout", "60"]
    ranks = [Rank(rank, 2, f"net{rank}", arguments) for rank in range(2)]
    command("ip", "link", "add", "net0", "type", "veth", "peer", "name", "net1")
    for rank in ranks:
        command("ip", "link", "set", rank.device, "mtu", str(MTU), "netns", str(rank.pid))
    try:
        for rank in ranks:
            delay = ("netem", "delay", f"{milliseconds}ms", "rate", f"{mbit}mbit", "limit", "10000")
            rank.command("tc", "qdisc", "add", "dev", rank.device, "root", *delay)
    except RuntimeError as error:
        print(json.dumps({"delay": "process", "reason": str(error)}), flush=True)
        ranks[0].ip("link", "del", "net0")
        helper = between(ranks, mbit, 1e-3 * milliseconds)
        return run(ranks, [helper])
    print(json.dumps({"delay": "netem"}), flush=True)
    for rank in ranks:
        rank.up()
    return run(ranks)


def between(ranks: Sequence[Rank], mbit: int, delay: float) -> int:
    """Two devices whose packets go through a process that holds each for `delay` seconds; tbf keeps the rate. Its pid."""
    descriptors = []
    for rank in ranks:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", rank.device.encode(), IFF_TUN | IFF_NO_PI))
        descriptors.append(descriptor)
        command("ip", "link", "set", rank.device, "mtu", str(MTU), "txqueuelen", "5000", "netns", str(rank.pid))
        rank.up()
        rate = ("tbf", "rate", f"{mbit}mbit", "burst", str(MTU + 96), "limit", "16mb")
        rank.command("tc", "qdisc", "add", "dev", rank.device, "root", *rate)
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            hold(descriptors, delay)
        finally:
            os._exit(1)
    return pid


def hold(descriptors: Sequence[int], delay: float) -> None:
    """Passes packets from each of two devices to the other, `delay` seconds after they came."""
    other = dict(zip(descriptors, reversed(descriptors)))
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for descriptor in select.select(descriptors, [], [], timeout)[0]:
            came = time.monotonic()
            while packet := read(descriptor):
                count += 1
                heapq.heappush(waiting, (came + delay, count, other[descriptor], packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(waiting)
            os.write(target, packet)


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


# -------------------------------------------------------------------------------- four ranks on a switch, one slow link


def four(file: str, fast: int, slow: int, one: int, other: int) -> int:
    arguments = ["--sizes", "8,32K,128K", "--seconds", "0.1", "--tolerance", "5", "--json", file, "--timeout", "60"]
    ranks = [Rank(rank, 4, f"net{rank}", arguments) for rank in range(4)]
    command("ip", "link", "add", "switch", "type", "bridge")
    command("ip", "link", "set", "switch", "up")
    for rank in ranks:
        port = f"port{rank.rank}"
        command("ip", "link", "add", port, "type", "veth", "peer", "name", rank.device)
        command("ip", "link", "set", rank.device, "netns", str(rank.pid))
        command("ip", "link", "set", port, "master", "switch", "up")
        rank.up()
        tc = ("tc", "qdisc", "add", "dev", rank.device, "root", "handle", "1:", "htb", "default", "1")
        rank.command(*tc)
        rank.command(
            "tc", "class", "add", "dev", rank.device, "parent", "1:", "classid", "1:1", "htb", "rate", f"{fast}mbit"
        )
    for rank, partner in ((one, other), (other, one)):
        device = ranks[rank].device
        of_class = ("tc", "class", "add", "dev", device, "parent", "1:", "classid", "1:2", "htb", "rate", f"{slow}mbit")
        ranks[rank].command(*of_class)
        to_partner = ("u32", "match", "ip", "dst", f"10.9.0.{partner + 1}/32", "flowid", "1:2")
        ranks[rank].command("tc", "filter", "add", "dev", device, "parent", "1:", "protocol", "ip", *to_partner)
    print(json.dumps({"slow": [one, other]}), flush=True)
    return run(ranks)


MODES: dict[str, Callable[[list[str]], int]] = {
    "two": lambda words: two(words[0], int(words[1]), float(words[2])),
    "four": lambda words: four(words[0], *map(int, words[1:])),
}

if __name__ == "__main__":
    sys.exit(MODES[sys.argv[1]](sys.argv[2:]))
