"""`python -m pretrain.verify_resume --config X [key=value ...]`: is a resumed run the same as an uninterrupted one?"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from pretrain.exit import ERROR, FINISHED, USAGE

EXAMPLES = """examples:
  python -m pretrain.verify_resume --config configs/runs/quickstart.yaml
  python -m pretrain.verify_resume --config configs/runs/quickstart.yaml --ranks 2 train.micro_batch=4
  python -m pretrain.verify_resume --config configs/runs/quickstart.yaml --ranks 2 --layout pp=2
  python -m pretrain.verify_resume --config X.yaml --ranks 8 engine.kind=deepspeed engine.stage=2 model.width=256

Three runs of the configuration as it is, one after the other: uninterrupted; killed (SIGKILL, every rank) after the checkpoint of
step --at was committed; resumed. Then every tensor (model, optimizer, random streams of every rank), the data's position and
all else in meta.json, and every step's metrics are compared bit by bit. A big model can be made smaller with key=value.
Only train.steps (to --steps, so that the schedule is that of a run of so many steps), run, checkpoint.every, checkpoint.keep
and log.tensorboard are set by this command, alike in all runs. All ranks are on this machine. Disk: five checkpoints.
Exit codes: 0 equal, 1 different or a run failed, 2 bad usage or configuration."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.verify_resume",
        description="Prove that a run that was killed and resumed equals an uninterrupted one, bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field by its dotted name: mesh.pp=2")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, all on this machine (default 1)")
    parser.add_argument("--layout", metavar="LAYOUT", help="the mesh in short: pp=2, or tp=2,cp=2; else as configured")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="length of the runs (default 8)")
    parser.add_argument("--at", type=int, default=4, metavar="N", help="the step to resume from (default 4)")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="where the runs go (default: beside the run folder)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the three runs and what their ranks printed")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: give a number of at least 1")
    if not 2 <= arguments.at <= arguments.steps - 2:
        parser.error(
            f"--at {arguments.at} --steps {arguments.steps}: two steps are taken before the checkpoint and two after it, "
            "so --at must be from 2 to --steps minus 2"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("this command starts the ranks itself: run it without a launcher, with --ranks N")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.config import ConfigError, load
    from pretrain.train import layout
    from pretrain.verify_resume.proof import RunFailed, prove

    try:
        config = load(arguments.config, [*arguments.overrides, f"train.steps={arguments.steps}"])
        if arguments.layout is not None:
            from pretrain.equivalence import layouts

            mesh = layouts.parse(arguments.layout, config, arguments.ranks)
            config = config.model_copy(update={"mesh": mesh})
        layout.check(config, arguments.ranks)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    place = arguments.scratch or config.run.parent
    place.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="verify_resume-", dir=place))
    try:
        faults = prove(config, arguments.ranks, arguments.at, scratch, lambda line: print(line, flush=True))
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if arguments.keep:
            print(f"kept: {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    for fault in faults:
        print(fault)
    print("NOT EQUAL" if faults else "resumed equals uninterrupted, bit for bit")
    return ERROR if faults else FINISHED


if __name__ == "__main__":
    sys.exit(main())
