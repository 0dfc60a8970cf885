"""The command that keeps a training job going: torchrun, and torchrun again after a crash, as long as that leads anywhere."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  python -m launch.supervise --nproc-per-node 8 -- pretrain/main.py --config configs/runs/X.yaml run=runs/x
  python -m launch.supervise --nproc-per-node 8 --nnodes 2 --rdzv-endpoint n1:29400 -- pretrain/main.py ...    (on each host)
  python -m launch.supervise --nproc-per-node 8 --nnodes 3:4 --rdzv-endpoint n1:29400 -- pretrain/main.py ...  (or with 3)
  python -m launch.supervise --preflight --nproc-per-node 8 -- pretrain/main.py ...    (checks the host before)
  python -m launch.supervise --journal runs/x
  python -m launch.supervise --readmit n7 runs/x

By the exit code of the ranks: 0 ends the job; so do 2 (usage), 77 (data), 78 (no loadable checkpoint) and 79 (numerical fault);
75 (preempted) ends it with 75 unless --restart-preempted; 76 (hang), kills and all else start torchrun again after a while.
SIGTERM, SIGUSR1, SIGHUP and Ctrl-C go to the ranks, which save; the supervisor waits for them and ends with 75. Once more, and
torchrun is ended, with half a minute for its ranks.

The global batch belongs to the configuration: with other hosts there are other ranks, and the same batches go on. A number of
ranks that does not divide them ends the job with 2 and the sizes that would do."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.supervise", usage="%(prog)s [options] -- SCRIPT [arguments]", epilog=EXAMPLES,
        description="Start a training job under torchrun, and start it again when it crashes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--nproc-per-node", default="1", metavar="N", help="ranks on this host; also auto, gpu, cpu (default 1)")
    add("--nnodes", type=_nodes, default=(1, 1), metavar="N|MIN:MAX", help="hosts; MIN:MAX goes on with fewer")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where hosts meet; the same on each of them")
    add("--rdzv-id", default="braid", metavar="ID", help="a name of the job, the same on each host (default braid)")
    add("--rdzv-conf", metavar="K=V,...", help="as torchrun's: join_timeout, last_call_timeout, ...")
    add("--local-addr", metavar="ADDRESS", help="of this host, where its name does not do")
    add("--host", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname(), help="this host in the journal")
    add("--run", type=Path, metavar="FOLDER", help="the run folder; by default what SCRIPT's run= or --config say")
    add("--max-restarts", type=int, default=5, metavar="K", help="in a row without a newer checkpoint (default 5)")
    add("--wait", type=float, default=5.0, metavar="S", help="before the first restart; then doubled (default 5)")
    add("--max-wait", type=float, default=300.0, metavar="S", help="the longest wait before a restart (default 300)")
    add("--seed", default="0", help="of the jitter of the waits; the same on each host (default 0)")
    add("--restart-preempted", action="store_true", help="go on after 75, unless this supervisor was told to stop")
    add("--exclude-after", type=int, default=3, metavar="N", help="first failures until a host is left out; 0: never")
    add("--wait-for-run", type=float, default=120.0, metavar="S", help="while another job has the folder (default 120)")
    add("--patience", type=float, default=10.0, metavar="S", help="in which signals are one request (default 10)")
    add("--preflight", action="store_true", help="check this host first (launch.preflight); do not start if it fails")
    add("--slurm", action="store_true", help="end with 75 when a host is excluded: the job is requeued without it")
    add("--journal", type=Path, metavar="RUN", help="print the journal of a run as a table and leave")
    add("--excluded", action="store_true", help="print the hosts excluded from this job, a line each, and leave")
    add("--readmit", nargs=2, metavar=("HOST", "RUN"), help="let an excluded host in again and leave")
    cut = list(argv).index("--") if "--" in argv else len(argv)  # what follows is not ours to read
    options = parser.parse_args(argv[:cut])
    options.command = list(argv[cut + 1 :])
    if options.journal or options.readmit:
        return options
    if not options.command:
        parser.error("no script; give it after --, as in: -- pretrain/main.py --config configs/runs/quickstart.yaml")
    if options.nnodes != (1, 1) and not options.rdzv_endpoint:
        parser.error("--nnodes needs --rdzv-endpoint HOST:PORT, the same on each host")
    try:
        options.run = options.run or run_folder(options.command)
    except (OSError, ValueError) as error:
        parser.error(f"{error}; name the run folder with --run")
    return options


def _nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        least, most = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN:MAX") from None
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: MIN is at least 1 and at most MAX")
    return least, most


def run_folder(command: Sequence[str]) -> Path:
    """The run folder of a training command: its last run=, or the `run` of its --config file.

    Raises ValueError when there is neither, OSError when the file cannot be read.
    """
    given = [word.removeprefix("run=") for word in command if word.startswith("run=")]
    if given:
        return Path(given[-1])
    for word, following in zip(command, [*command[1:], ""]):
        file = following if word == "--config" else word.removeprefix("--config=") if "--config=" in word else ""
        if file:
            import yaml

            with Path(file).open(encoding="utf-8") as stream:
                try:
                    content = yaml.safe_load(stream)
                except yaml.YAMLError as error:
                    raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
            if isinstance(content, dict) and content.get("run"):
                return Path(str(content["run"]))
    raise ValueError("the script's arguments have neither run=FOLDER nor a --config file with a `run`")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    from launch import blame
    from launch.journal import Journal, show

    if options.journal:
        return show(options.journal)
    if options.readmit:
        host, run = options.readmit[0], Path(options.readmit[1])
        Journal(run).append({"event": "readmit", "host": host, "decision": "readmit", "why": "by hand"})
        return 0
    if options.excluded:
        for host in sorted(blame.excluded(Journal(options.run).records(), options.exclude_after)):
            print(host)
        return 0
    from launch.agent import Requests, adopt_orphans
    from launch.supervisor import Supervisor

    requests = Requests(options.patience)
    requests.watch()
    adopt_orphans()
    return Supervisor(options, requests).supervise()


if __name__ == "__main__":
    sys.exit(main())
