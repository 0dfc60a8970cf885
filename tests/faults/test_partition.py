"""A network that falls in two: nobody waits without end, and once it is whole again the run goes on where it was saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.partition import CUT, STEPS
from tests.ranks import ROOT


def networks_allowed() -> bool:
    """Whether this user may make networks of their own."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    command = ["unshare", "-Urn", "ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not networks_allowed(), reason="needs unshare, nsenter, ip, and leave to make network namespaces")
def test_a_pulled_cable_ends_both_ranks_and_the_run_goes_on_after(corpus: Path, tmp_path: Path) -> None:
    command = ["unshare", "-Urn", sys.executable, "tests/faults/partition.py", str(tmp_path / "run"), str(corpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [code for code, _ in found["first"]] == [76, 76], found["first"]
    said = "\n".join(text for _, text in found["first"])
    assert f"in phase step, step {CUT + 1}" in said, said
    assert [code for code, _ in found["again"]] == [0, 0], found["again"]
    assert "\nresumed after step 10\n" in found["again"][0][1]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == STEPS
