"""One job to a run folder: two jobs that write there would sweep and prune each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.durable import make_folder, read_json, write_json
from pretrain.checkpoint.errors import LeaseHeld

# Filesystems that cannot lock say so in one of these ways.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lease:
    """The right to write in `folder`, held by a kernel lock (flock) on `lease.lock` and described in `lease.json`.

    The kernel drops the lock when the process ends, however it ends, so a job that was killed never blocks the next.
    `lease.json` only serves the error message. Only the coordinator (rank 0) takes the lock; all ranks hear the outcome.

    Network filesystems. NFS 4, and NFS 3 with lockd, turn flock into a lock on the server, so jobs on other nodes are
    seen; after the loss of a whole node the server gives the lock up once the client's own lease runs out (about 90 s
    on NFS 4; on NFS 3 perhaps only when the node is back). Mounted with `nolock` or `local_lock=flock`, and on Lustre
    with `localflock`, only jobs on the same node see each other. Where locks are not supported at all (Lustre without
    the `flock` option, some FUSE filesystems) a line goes to `report` and the job runs without the protection.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        agreement: Agreement | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.agreement = agreement or Agreement()
        self.report = report
        self._acquired = False
        self._descriptor: int | None = None  # stays None on ranks other than the coordinator
        # A fork shares the lock, not a copy of it: without this, a data worker that outlives the job would hold it on.
        os.register_at_fork(after_in_child=self._close)

    def acquire(self) -> Lease:
        """Take the lease. Collective. Every rank raises LeaseHeld, naming host, process and since when, if it is taken."""
        self.agreement.decide("taking the lease on the run folder", self._lock)
        self._acquired = True
        return self

    def _lock(self) -> None:
        assert self._descriptor is None, "the lease is taken once"
        make_folder(self.folder)
        # The lock file is never removed: a lock on a removed file would exclude nobody who opens the new one.
        descriptor = os.open(self.folder / "lease.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LeaseHeld(self._refusal()) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            self.report(f"{self.folder} is on a filesystem without locks: nothing keeps a second job out of it")
            return
        self._descriptor = descriptor
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.folder / "lease.json", {"host": socket.gethostname(), "pid": os.getpid(), "since": now})

    def _refusal(self) -> str:
        try:
            holder = read_json(self.folder / "lease.json")
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another job"  # it has the lock and has not yet written who it is
        return f"{self.folder} is in use by {who}. Stop that job, or choose another run folder."

    def release(self) -> None:
        """Give the lease up; the end of the process does it too."""
        self._acquired = False
        if self._descriptor is not None:
            (self.folder / "lease.json").unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lease:
        return self if self._acquired else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
