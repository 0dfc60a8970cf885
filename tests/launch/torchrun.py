"""What launch/elastic.py does, without torch: starts ranks, ends all when one fails, and leaves the same report. For one host.

The real one takes two seconds to import torch, each time. Tests of what torchrun itself does use the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

report, parent, *arguments = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
options: dict[str, str] = {}
while arguments[0].startswith("--"):
    options[arguments[0]] = arguments[1]
    arguments = arguments[2:]
(Path(report).parent.parent / "torchrun_options").write_text(json.dumps(options))
count = int(options["--nproc-per-node"])
# In a job of two hosts, the second one's ranks come after the first one's.
first = int(os.environ.get("FIRST_RANK", 0))
stopped: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
if os.environ.get("NEVER_MEETS"):
    while not stopped:
        time.sleep(0.02)
    sys.exit(143)
ranks = []
for local in range(count):
    folder = Path(options["--log-dir"]) / "id_x" / "attempt_0" / str(local)
    folder.mkdir(parents=True)
    environment = {
        **os.environ, "RANK": str(first + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(count),
        "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
    }  # fmt: skip
    ranks.append(subprocess.Popen([sys.executable, *arguments], env=environment, start_new_session=True))
ended: dict[int, int] = {}
while not stopped and len(ended) < count and not any(ended.values()):
    time.sleep(0.02)
    ended |= {local: rank.returncode for local, rank in enumerate(ranks) if rank.poll() is not None}
failures = {local: (code, int(time.time())) for local, code in ended.items() if code}
for rank in ranks:
    with contextlib.suppress(ProcessLookupError):
        rank.terminate()
for local, rank in enumerate(ranks):
    try:
        code = rank.wait(float(os.environ.get("KILLS_AFTER", 60)))
    except subprocess.TimeoutExpired:
        rank.kill()
        code = rank.wait()
    if code and local not in failures:
        failures[local] = (code, int(time.time()))
if "ENDS_WITH" in os.environ:  # without ranks, until the test says so
    while not stopped and not Path(os.environ["ENDS_WITH"]).exists():
        time.sleep(0.02)
if stopped:
    sys.exit(143)
rows = [{"rank": first + n, "local_rank": n, "code": code, "time": when} for n, (code, when) in failures.items()]
if rows:
    Path(report).write_text(json.dumps({"failures": rows}))
sys.exit(1 if rows else 0)
