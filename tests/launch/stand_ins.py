"""Stand-ins for the commands that reach other machines. They run what they are given on this one, as the node NODE says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.ranks import ROOT

# Every Python with a rank says so: a file NODE-RANK in the folder PLACES.
NOTE = """
import os
if "RANK" in os.environ and "NODE" in os.environ:
    os.makedirs(os.environ["PLACES"], exist_ok=True)
    open(os.path.join(os.environ["PLACES"], os.environ["NODE"] + "-" + os.environ["RANK"]), "w").close()
"""

COMMANDS = {
    # ssh [options] HOST hostname [-I]: what deepspeed asks of the first host
    "ssh": """
        print(sys.argv[-3] if sys.argv[-1] == "-I" else "stand-in")
        """,
    # pdsh -S -f N -w HOST,HOST COMMAND...: on all hosts at once, %n being the host's number; the largest exit code
    "pdsh": """
        hosts = sys.argv[sys.argv.index("-w") + 1].split(",")
        command = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
        if command.startswith("pkill"):
            sys.exit("no processes are looked for by name here")
        sys.exit(everywhere([(host, ["bash", "-c", command.replace("%n", str(n))], {}) for n, host in enumerate(hosts)]))
        """,
    # srun [options] python ARGUMENTS...: one task on each of two nodes; the largest exit code
    "srun": """
        (here / "srun").write_text(json.dumps(sys.argv))
        (here / "environment").write_text(json.dumps(dict(os.environ)))
        if "STEP_ENDS_WITH" in os.environ:
            sys.exit(int(os.environ["STEP_ENDS_WITH"]))
        command = sys.argv[sys.argv.index("python") :]
        hosts = ("127.0.0.1", "127.0.0.2")
        sys.exit(everywhere([(host, command, {"SLURMD_NODENAME": host, "PET_LOCAL_ADDR": host}) for host in hosts]))
        """,
    # Every call is noted. Slurm may refuse to change a job that does not wait in the queue.
    "scontrol": """
        before = (here / "scontrol").read_text() if (here / "scontrol").exists() else ""
        (here / "scontrol").write_text(before + " ".join(sys.argv[1:]) + "\\n")
        if sys.argv[1:3] == ["show", "hostnames"]:
            print("127.0.0.1", "127.0.0.2", sep="\\n")
        elif sys.argv[1:3] == ["show", "job"]:
            print("JobId=4711 JobName=braid\\n   ReqNodeList=(null) ExcNodeList=" + os.environ.get("EXCLUDED", "(null)"))
        elif sys.argv[1] == "update" and "LATE" in os.environ and "requeue" not in before:
            sys.exit("Job is no longer pending execution")
        """,
    "nvidia-smi": """
        print(os.environ.get("GPUS", ""))
        """,
}

# What Slurm says to a job.
JOB_OF_SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "[two nodes]", "SLURM_SUBMIT_DIR": str(ROOT)}

HEAD = """
import json, os, subprocess, sys
from pathlib import Path

here = Path({here!r})

def everywhere(commands):
    running = [subprocess.Popen(line, env={{**os.environ, **extra, "NODE": node}}) for node, line, extra in commands]
    return max(process.wait() for process in running)
"""


def install(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Writes the stand-ins to `folder`; returns the environment in which they are found first."""
    (folder / "bin").mkdir()
    for name, body in COMMANDS.items():
        lines = [line[8:] for line in body.splitlines()]
        file = folder / "bin" / name
        file.write_text(f"#!{sys.executable}\n{HEAD.format(here=str(folder))}" + "\n".join(lines))
        file.chmod(0o755)
    (folder / "sitecustomize.py").write_text(NOTE)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), environment["PATH"]])
    return {**environment, "PATH": path, "PYTHONPATH": str(folder)}
