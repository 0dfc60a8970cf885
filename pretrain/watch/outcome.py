"""How a training process ended: for the launcher, which takes an exit code, and for torchrun, which reads a file as well."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.watch.pulse import Beat


def of_rank() -> dict[str, Any]:
    """Who this is, as the launcher says."""
    return {
        "rank": int(os.environ.get("RANK", 0)),
        "local_rank": int(os.environ.get("LOCAL_RANK", 0)),
        "host": socket.gethostname(),
    }


def record(message: str, code: int, beat: Beat) -> None:
    """Writes the file that torchrun asks for, so that its summary names the cause and not what followed from it.

    code: the exit code; of a process that a signal ended, minus its number, as subprocess has it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or code == 0:
        return
    more = {
        "timestamp": str(int(time.time())),
        "exit_code": code,
        **of_rank(),
        "phase": beat.phase,
        "step": beat.step if beat.step >= 0 else None,
        "signal": -code if code < 0 else None,
    }
    try:
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))
    except OSError as error:
        print(f"cannot write {path}: {error}", file=sys.stderr, flush=True)


def die(number: int) -> None:
    """Ends this process by a signal, the one that ended the training process: launchers tell a crash from a kill by it."""
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of interest is the other one's
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
