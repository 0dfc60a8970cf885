"""torchrun, with a report of how each rank ended: torchrun itself answers 1 whatever its ranks ended with.

    python launch/elastic.py REPORT PARENT [options of torchrun] script [arguments]

Started by launch/supervise.py. When its parent (the process PARENT) dies, it ends its ranks and leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> int:
    report, parent, *arguments = sys.argv[1:]
    with contextlib.suppress(AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return 1  # it had died before this process could ask to be told

    # A scheduler that signals every process means the ranks. (A handler, for ranks would inherit that it is ignored.)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)

    def note(**what: Any) -> None:
        Path(report).write_text(json.dumps(what), encoding="utf-8")

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        note(
            failures=[
                {"rank": rank, "local_rank": each.local_rank, "code": each.exitcode, "time": each.timestamp}
                for rank, each in error.failures.items()
            ]
        )
        print(error, file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        note(trouble=f"torchrun was ended by {signal.Signals(error.sigval).name}")
        return 128 + error.sigval
    except Exception as error:
        note(trouble=f"torchrun: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
