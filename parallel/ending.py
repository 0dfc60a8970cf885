"""How a command of several ranks ends its process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def end(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with the exit code that it returns: `if __name__ == "__main__": end(main)`.

    As `sys.exit(main())` does, but for the interpreter's own end. torch's gloo threads hold the tensors of a collective until
    some moment after it is done, and need the interpreter to let them go. If that moment comes while it is taking itself down,
    it ends the thread in the middle of C++ code, and that aborts the process: a run that has finished would leave with -6, and
    be started again as one that crashed. So threads are joined, exit functions called and output flushed as always, and then the
    process is gone at once.
    """
    try:
        code = _as_code(main())
    except SystemExit as leaving:
        code = _as_code(leaving.code)
    except KeyboardInterrupt:
        raise  # ends with the signal itself, as a shell wants to hear
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins what is not a daemon
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def _as_code(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1
