"""Deliberate faults in the product, each of which a named test must notice: `python -m tests.faults.mutations [name ...]`.

The faults are in tests/faults/mutants_*.py: lists MUTANTS of (name, path, old text, new text, test). Each is put into a copy of
the tracked files, the test is run there, and the table says who was killed. A mutant that survives is a test that is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """old: a text that is in the file once; new: what stands there instead; test: the pytest node that must then fail."""

    name: str
    path: str
    old: str
    new: str
    test: str


class Kill(NamedTuple):
    """verdict: killed, SURVIVED, or INVALID (the mutant cannot be applied, or its test not be run)."""

    mutant: Mutant
    verdict: str
    seconds: float
    why: str


def mutants() -> list[Mutant]:
    """Of all lists, in the order of the files' names. Names are unique."""
    found = []
    for file in sorted(Path(__file__).parent.glob("mutants_*.py")):
        module = importlib.import_module(f"tests.faults.{file.stem}")
        found += [Mutant(*entry) for entry in module.MUTANTS]
    twice = [name for name, count in Counter(mutant.name for mutant in found).items() if count > 1]
    if twice:
        raise ValueError(f"mutants that share a name: {', '.join(twice)}")
    return found


def applied(mutant: Mutant, text: str) -> str:
    """The file with the fault. Raises ValueError unless the old text is there once."""
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"the old text is {count} times in {mutant.path}")
    return text.replace(mutant.old, mutant.new)


def copy_of_tracked_files(to: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():  # a file that is deleted and not committed is still listed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run(tests: list[str], where: Path, timeout: float) -> tuple[int, str]:
    """(pytest's exit code, its output); 124 when it took too long."""
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=where, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return 124, str(error)
    return done.returncode, done.stdout


def put_to_the_test(mutant: Mutant, where: Path, timeout: float) -> Kill:
    file = where / mutant.path
    good = file.read_text()
    start = time.perf_counter()
    try:
        file.write_text(applied(mutant, good))
        code, output = run([mutant.test], where, timeout)
    except (ValueError, OSError) as error:
        return Kill(mutant, "INVALID", 0.0, str(error))
    finally:
        file.write_text(good)
    seconds = time.perf_counter() - start
    lines = [line for line in output.splitlines() if line.strip()]
    if code in (1, 124):
        why = next((line for line in lines if line.startswith("FAILED")), "took too long" if code == 124 else "failed")
        return Kill(mutant, "killed", seconds, why)
    if code == 0:
        return Kill(mutant, "SURVIVED", seconds, f"{mutant.test} passed")
    return Kill(mutant, "INVALID", seconds, f"pytest ended with {code}: {lines[-1] if lines else ''}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="mutants, or parts of their names; all when left out")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of one test (default 300)")
    arguments = parser.parse_args(argv)
    known = mutants()
    chosen = [m for m in known if not arguments.names or any(name in m.name for name in arguments.names)]
    if not chosen:
        parser.error(f"no mutant of that name; there are: {', '.join(m.name for m in known)}")
    if arguments.list:
        print("\n".join(f"{mutant.name}: {mutant.test}" for mutant in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        where = Path(folder)
        copy_of_tracked_files(where)
        tests = list(dict.fromkeys(mutant.test for mutant in chosen))
        code, output = run(tests, where, arguments.timeout * len(tests))
        if code:
            print(f"without any fault the tests already fail:\n{output[-3000:]}")
            return 2
        kills = []
        for mutant in chosen:
            kills.append(put_to_the_test(mutant, where, arguments.timeout))
            print(line(kills[-1]), flush=True)
    dead = sum(kill.verdict == "killed" for kill in kills)
    print(f"\n{dead} of {len(kills)} mutants killed")
    return int(dead < len(kills))


def line(kill: Kill) -> str:
    text = f"{kill.mutant.name:44} {kill.verdict:8} {kill.seconds:5.1f} s  "
    return text + (kill.mutant.test if kill.verdict == "killed" else kill.why)


if __name__ == "__main__":
    sys.exit(main())
