"""What can go wrong with data, each kind with the exit code that the commands end with."""

from __future__ import annotations

from pretrain.exit import BAD_DATA, ERROR, USAGE, Exit


class DataError(Exit):
    """Data on disk is missing or corrupt. The message names the file, the place in it and the repair. Exit code 77."""

    def __init__(self, message: str):
        super().__init__(message, BAD_DATA)


class PrepareFailure(Exit):
    """Preparing stopped for a reason outside the data (no space, interrupted, a worker killed). Exit code 1."""

    def __init__(self, message: str):
        super().__init__(message, ERROR)


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what to ask for instead. Exit code 2."""

    exit_code = USAGE
