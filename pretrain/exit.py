"""Exit codes, the same for every command, and the error that carries one."""

from __future__ import annotations

FINISHED = 0
ERROR = 1
USAGE = 2
PREEMPTED = 75
HANG = 76
BAD_DATA = 77
NO_CHECKPOINT = 78
NUMERICAL = 79


class Exit(Exception):
    """Ends the command with one clear line and an exit code."""

    def __init__(self, message: str, exit_code: int = ERROR):
        super().__init__(message)
        self.exit_code = exit_code
