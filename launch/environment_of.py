"""The environment that suits a chip, as lines for a shell.

    eval "$(python -m launch.environment_of configs/hardware/mi300x.yaml)"
    eval "$(python -m launch.environment_of)"          of the first GPU that nvidia-smi or rocm-smi finds here

The lines export what the file's `environment` has. A variable that is set already keeps its value; a comment says so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.estimate.hardware import Hardware, named, read
from pretrain.exit import Exit

# Each prints the names of this machine's GPUs, with whatever else.
TOOLS = (
    ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
    ("rocm-smi", "--showproductname"),
    ("amd-smi", "static", "--asic"),
)
PATIENCE = 30.0  # seconds; these tools hang where a driver does


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.environment_of",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", nargs="?", type=Path, help="of configs/hardware/; found by the GPU's name when left out"
    )
    file = parser.parse_args(argv).file
    try:
        hardware = read(file) if file is not None else detect()
    except Exit as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if hardware is None:
        print("# no GPU here that configs/hardware/ knows: nothing is set")
    else:
        print("\n".join(lines(hardware, os.environ)))
    return 0


def detect() -> Hardware | None:
    """The hardware file of this machine's GPUs, by the tools that drivers bring."""
    for command in TOOLS:
        if shutil.which(command[0]) is None:
            continue
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"# {command[0]}: {error}", file=sys.stderr)
            continue
        if (hardware := named(said)) is not None:
            return hardware
    return None


def lines(hardware: Hardware, present: Mapping[str, str]) -> list[str]:
    """What a shell is to run. present: the environment so far, which wins."""
    found = [f"# {hardware.name}"]
    for name, value in hardware.environment.items():
        if name in present:
            found.append(f"# {name} is set already")
        else:
            found.append(f"export {name}={shlex.quote(value)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
