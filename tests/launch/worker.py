"""A rank without torch, which does what a plan says, so that supervision can be tested in a second.

    worker.py run=FOLDER

FOLDER/plan.json is a list, an entry a launch (the last one holds for all later launches), by rank:
{"0": "save 2 > exit 75", "*": "wait"}.
What a rank can do, one after the other: `save N` (a checkpoint of step N appears), `meet` (all
ranks have come as far in this launch, also those of other hosts), `noted HOST WORD` (the journal has that event or decision of
that host), `kill` (itself), `exit C [message]` (with an error file as pretrain/watch writes), `silent C` (without one), `wait`
(until SIGTERM or SIGUSR1; then it saves and ends with 75), `wait together` (until both ranks have been asked), `stubborn` (no
signal helps). Every signal and every start is noted in FOLDER/notes, a file a rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

run = Path(sys.argv[1].removeprefix("run="))
rank = int(os.environ["RANK"])
notes = run / "notes" / str(rank)
asked: list[int] = []
deadline = time.monotonic() + 100.0  # nothing is left for ever, even when what is tested does not work


def note(text: str) -> None:
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.open("a") as file:
        file.write(text + "\n")


def noted_by(of_rank: int) -> str:
    file = run / "notes" / str(of_rank)
    return file.read_text() if file.exists() else ""


def journal() -> list[dict[str, str]]:
    whole = (run / "supervise.jsonl").read_text().rpartition("\n")[0]  # the last line may be under way
    return [json.loads(line) for line in whole.splitlines()]


def until(true: Callable[[], object]) -> None:
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def noted(host: str, what: str) -> None:
    until(lambda: any(r["host"] == host and what in (r["event"], r.get("decision")) for r in journal()))


def save(step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True, parents=True)
    if rank == 0:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(exist_ok=True)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")


def leave(code: int, message: str = "") -> None:
    extra = {
        "timestamp": str(int(time.time())), "exit_code": code, "rank": rank, "local_rank": int(os.environ["LOCAL_RANK"]),
        "host": "unused", "phase": "step", "step": 41, "signal": None,
    }  # fmt: skip
    content = {"message": {"message": message or f"code {code}", "extraInfo": extra}}
    if code:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
    sys.exit(code)


def on_signal(number: int, frame: object) -> None:
    asked.append(number)
    note(signal.Signals(number).name)


for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, on_signal)
host = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[3].name
before = sum(record["event"] == "start" and record["host"] == host for record in journal()) - 1
plan = json.loads((run / "plan.json").read_text())
actions = plan[min(before, len(plan) - 1)]
note(f"start {os.getpid()} of {os.environ['WORLD_SIZE']}")  # from here on, a test may write another plan
for action in actions.get(str(rank), actions.get("*", "exit 0")).split(" > "):
    word, _, rest = action.partition(" ")
    if word == "save":
        save(int(rest))
    elif word == "meet":
        until(lambda: all(noted_by(other).count("start") > before for other in (0, 1)))
    elif word == "noted":
        noted(*rest.split())
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "exit":
        code, _, message = rest.partition(" ")
        leave(int(code), message)
    elif word == "silent":
        sys.exit(int(rest))
    elif word == "wait":
        until(lambda: asked)
        if rest == "together":  # a rank that ends has torchrun end the others
            until(lambda: all("SIG" in noted_by(other) for other in (0, 1)))
        time.sleep(0.2)  # a save takes a while
        save(99)
        leave(75)
    elif word == "stubborn":
        until(lambda: False)
