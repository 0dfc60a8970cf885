"""The guided first run: prepare, train, kill, resume, compare with gzip and xz, write a sample.

`bash launch/quickstart.sh` makes the environment and calls this. Every step is an ordinary command that is printed before it
runs, so that it can be repeated by hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/runs/quickstart.yaml"
# Not code but generated tables, tests that distributions strip, and other people's packages: left out, so that every machine
# trains on about the same text.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the training configuration")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="where to put the corpus")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), help="the run's folder; begun anew if it exists"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    os.chdir(ROOT)
    start = time.monotonic()
    title("1. A corpus: this Python's standard library")
    if (arguments.data / "manifest.json").exists():
        print(f"{arguments.data} is already there")
    else:
        run(
            python(
                "-m", "pretrain.data", "prepare", *sources(), "--vocabulary", "1024", "--output", str(arguments.data)
            )
        )
    title("2. Training, and an accident: the process is killed after its first checkpoint")
    if arguments.run.exists():
        shutil.rmtree(arguments.run)
    command = python(
        "pretrain/main.py",
        "--config",
        CONFIG,
        f"run={arguments.run}",
        f"data.path={arguments.data}",
        *arguments.overrides,
    )
    kill_after_first_checkpoint(command, arguments.run / "checkpoints")
    title("3. The same command again: it resumes")
    run(command)
    title("4. What the model writes")
    run(
        python(
            "-m", "pretrain.generate", "--checkpoint", str(arguments.run), "--prompt", "def read_lines(path):",
            "--tokens", "120", "--temperature", "0.6", "--seed", "1",
        )
    )  # fmt: skip
    title("5. How well it knows the held-out text")
    beaten = compare(arguments.data / "validation_text.bin", arguments.run)
    print(f"\nloss curve: {arguments.run / 'loss.png'}\nall of it took {time.monotonic() - start:.0f} s")
    if not beaten and not arguments.overrides:
        print("error: the model did not beat the compressors, although nothing was changed", file=sys.stderr)
        return 1
    return 0


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def show(command: list[str]) -> None:
    print("$ " + shlex.join(["python", *command[1:]]), flush=True)


def run(command: list[str]) -> None:
    """Runs a command and ends the quickstart with its exit code if it fails."""
    show(command)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def sources() -> list[str]:
    """Arguments of prepare for the standard library's own modules."""
    library = sysconfig.get_paths()["stdlib"]
    return ["--input", f"{library}/**/*.py", *(part for name in LEFT_OUT for part in ("--exclude", f"*/{name}/*"))]


def kill_after_first_checkpoint(command: list[str], checkpoints: Path) -> None:
    """Starts a run and ends it with SIGKILL, which no process can catch, as soon as it has committed a checkpoint."""
    show(command)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and not list(checkpoints.glob("step_*")):
            time.sleep(0.2)
        if process.poll() is None:
            time.sleep(2.0)  # let it train past the checkpoint, so that something is lost and done again
            process.kill()
        elif process.returncode:
            sys.exit(process.returncode)
    finally:
        process.kill()
        process.wait()
    print(f"killed process {process.pid}")


def compare(text: Path, folder: Path) -> bool:
    """Prints bits per byte of the model beside those of gzip and xz on the same bytes; True if the model needs the fewest."""
    raw = text.read_bytes()
    last = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    rows = {
        "gzip -9": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        "this model": last["bits_per_byte"],
    }
    print(f"bits per byte on the {len(raw):,} bytes of {text}:")
    for name, bits in rows.items():
        print(f"  {name:<12}{bits:6.3f}  {'#' * round(20 * bits)}")
    return rows["this model"] == min(rows.values())


if __name__ == "__main__":
    sys.exit(main())
