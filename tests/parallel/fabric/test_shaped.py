"""Links of known rate and delay between network namespaces: what is measured is what was configured."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import QUIET, ROOT


@functools.cache
def obstacle(kind: str) -> str | None:
    """Why there can be no network here with a queueing discipline of this kind, or None."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "tc") if shutil.which(tool) is None]:
        return f"no {', '.join(missing)} on this machine"
    words = f"ip link add net0 type veth peer name net1 && tc qdisc add dev net0 root {kind}"
    done = subprocess.run(["unshare", "-Urn", "sh", "-c", words], capture_output=True, text=True, check=False)
    return done.stderr.strip().replace("\n", "; ") or f"exit code {done.returncode}" if done.returncode else None


def no_delay() -> str | None:
    """Why packets cannot be delayed: neither by netem nor, behind tbf, by a process."""
    if obstacle("netem delay 1ms") is None:
        return None
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return f"no netem ({obstacle('netem delay 1ms')}), and /dev/net/tun cannot be opened"
    return obstacle("tbf rate 100mbit burst 4096 limit 1mb")


def measured(*words: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the script said, what the benchmark wrote)."""
    file = folder / "pairs.json"
    command = ["unshare", "-Urn", sys.executable, "tests/parallel/fabric/shaped.py", words[0], str(file), *words[1:]]
    done = subprocess.run(
        command, cwd=ROOT, env={**QUIET, **os.environ}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[0]), json.loads(file.read_text())


@pytest.mark.campaign  # a measurement: the processes that hold packets back need a core of their own
@pytest.mark.skipif(no_delay() is not None, reason=f"no shaped network here: {no_delay()}")
def test_the_fit_recovers_rate_and_delay_of_a_link(tmp_path: Path) -> None:
    """100 Mbit/s and 20 ms one way: a machine that is busy with other tests adds a part of a millisecond."""
    _, found = measured("two", "100", "20", folder=tmp_path)
    assert [fit["group"] for fit in found["fits"]] == ["0>1", "1>0"]
    for fit in found["fits"]:
        assert fit["alpha_us"] == pytest.approx(20_000, rel=0.10), found
        assert fit["busbw_gbs"] == pytest.approx(0.1 / 8, rel=0.10), found
    assert [each for each in found["findings"] if each["what"] != "compute"] == []


@pytest.mark.skipif(
    obstacle("htb default 1") is not None, reason=f"no shaped network here: {obstacle('htb default 1')}"
)
def test_the_one_slow_link_among_four_networks_is_found(tmp_path: Path) -> None:
    """Networks on one bridge with 1 Gbit/s each; between two of them 20 Mbit/s."""
    _, found = measured("four", "1000", "20", "1", "3", folder=tmp_path)
    assert len(found["places"]) == 4
    links = [each for each in found["findings"] if each["what"] == "bandwidth"]
    assert [(each["kind"], each["ranks"], each["direction"]) for each in links] == [("link", [1, 3], "both")], found
    for one, other in ((1, 3), (3, 1)):
        assert found["bandwidth_gbs"][one][other] == pytest.approx(0.02 / 8, rel=0.10)
