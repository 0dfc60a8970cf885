"""What can go wrong with data, each kind with the exit code that the commands end with."""

from __future__ import annotations


class DataError(Exception):
    """Data on disk is missing or corrupt. The message names the file, the place in it and the repair. Exit code 77."""

    exit_code = 77


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what to ask for instead. Exit code 2."""

    exit_code = 2


class PrepareFailure(Exception):
    """Preparing stopped for a reason outside the data (no space, interrupted, a worker killed). Exit code 1."""

    exit_code = 1
