"""A lock on a run folder: two runs that write one folder would destroy each other's metrics and checkpoints.

The lock is `flock` on a small file, held as long as the process lives. The kernel releases it however the
process ends, so the lock itself is never stale; the file only tells who holds it, or who held it and died.
"""

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOCK = "run.lock"


class RunLockedError(ValueError):
    """Another process is using the run folder. The message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockOwner:
    """Who holds a run folder."""

    pid: int
    host: str
    started: str  # ISO 8601, UTC

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


class RunLock:
    """The lock on one run folder, taken by `acquire`; a context manager. One process of a run takes it."""

    def __init__(self, *, path: Path, descriptor: int, replaced: LockOwner | None) -> None:
        self.path = path
        self.replaced = replaced  # who held the folder before and died without releasing it; worth a log line
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, run_dir: Path) -> "RunLock":
        """Return the lock on the folder `run_dir`, which must exist. A dead owner's lock is taken over.

        Raises RunLockedError (a ValueError) while another process holds it, OSError where the file system has
        no locks.
        """
        path = run_dir / LOCK
        # The file is never deleted: whoever had opened it just before would lock a file without a name.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, run_dir)
            replaced = _read_owner(descriptor)
            _write_owner(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path=path, descriptor=descriptor, replaced=replaced)

    def release(self) -> None:
        """Give the folder back. Harmless when done twice."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            # Unlocked by name, not only closed: a child made by fork has a copy of the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = _read_owner(descriptor) or "another process"
        raise RunLockedError(
            f"{run_dir} is in use by {owner}; two runs cannot write one folder: wait for it, stop it, or "
            "choose another --name"
        ) from error
    except OSError as error:
        reason = f"cannot be locked ({error.strerror}); put runs_dir on a file system with flock"
        raise OSError(error.errno, reason, str(run_dir)) from error


def _read_owner(descriptor: int) -> LockOwner | None:
    """Return who wrote the lock file, None if it is empty or half written."""
    try:
        fields: Any = json.loads(os.pread(descriptor, 4096, 0))
        return LockOwner(pid=int(fields["pid"]), host=str(fields["host"]), started=str(fields["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _write_owner(descriptor: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    owner = LockOwner(pid=os.getpid(), host=socket.gethostname(), started=started)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
