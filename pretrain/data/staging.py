"""All or nothing: a folder is written under another name beside its place, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.errors import UsageError
from pretrain.data.manifest import NAME

_LOCK = ".lock"


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ValueError if `output` may not be written."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"--output {output} exists and is not empty; pass `--overwrite` to replace it, or another folder"
        )
    if not (output / NAME).is_file():
        raise UsageError(
            f"--output {output} holds something that `prepare` did not write (no {NAME}), so --overwrite leaves "
            f"it alone; name another folder"
        )


def _remove_abandoned(output: Path) -> None:
    # A killed run cannot tidy up. Its lock died with it, a running one's did not.
    for folder in output.parent.glob(f".{output.name}.*.partial"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    if output.exists():
        for folder in output.parent.glob(f".{output.name}.*.old"):
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its place when the block ends, and vanishes if the block
    raises.

    Whatever was at `output` stays until then, and is removed afterwards.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        with (folder / _LOCK).open("wb") as lock:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
            for path in folder.iterdir():
                _sync(path)
            (folder / _LOCK).unlink()
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
            _sync(folder)
            _exchange(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exchange(folder: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        folder.rename(output)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
        output.rename(old)
        try:
            folder.rename(output)
        except BaseException:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(output.parent)
