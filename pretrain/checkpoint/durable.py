"""Files and folders that survive a power cut.

A rename or a new file is only in the page cache until its *folder* is fsynced; fsync of the file alone saves the bytes
but not the name. Every function here returns once both are on disk, but for write_new, whose caller fsyncs the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was created in it, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder`, and the folders above it that are missing, durably. It may exist: another job may have made it just now."""
    missing = [each for each in folder.parents if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in (*reversed(missing), folder):
        with contextlib.suppress(PermissionError):  # a folder that may be entered but not read cannot be opened for it
            fsync_folder(each.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet. Its bytes are durable; its name is when the folder has been fsynced."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader, or a power cut, meets the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.temporary")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically and durably. Floats come back bit for bit; NaN and infinities are allowed."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises ValueError naming the file if it is not JSON, OSError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # both decoding errors are ValueErrors
        raise ValueError(f"{path} is damaged: {error}") from error
