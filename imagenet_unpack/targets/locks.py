"""Lock files: who may work on what. A lock ends with its process, so a dead run's is in nobody's way.

`flock` keeps runs apart on one host and, where the file system passes it on, between hosts. Two mounts of one folder
may each grant it (sshfs, NFS with `local_lock`, Lustre with `localflock`): `owner` covers those.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagenet_unpack.errors import TargetError

Pause = Callable[[float], None]
"""Waits for some seconds; may raise to end the waiting."""

_LEASE_WAIT_S = 20.0
_POLL_S = 0.05
_WAIT_POLL_S = 0.05
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
log = logging.getLogger(__name__)


class InUseError(TargetError):
    """Another run works on the same thing."""


class LockFile:
    """An open lock file.

    Args:
        path: the file; made where it is missing and the folder can be written.
        what: what it guards, for messages.
    """

    def __init__(self, path: Path, what: str = "") -> None:
        self._path = path
        self._what = what
        self._fd = _open(path)
        self._told = False

    def close(self) -> None:
        """Let go of it; never raises, as the end of the process does the same."""
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> LockFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def attempt(self, *, shared: bool = False, quiet: bool = False) -> bool:
        """Lock it without waiting, and say whether that worked; warn (unless `quiet`) where there are no locks."""
        if self._fd < 0:
            return True
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not (quiet or self._told):
                self._told = True
                log.warning("warning: the target's file system has no locks: make sure that only one run uses it")
        return True

    def unlock(self) -> None:
        """Unlock it."""
        with suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def wait(self, deadline_s: float = math.inf) -> bool:
        """Lock it when it becomes free; False: it did not before `deadline_s` (`time.monotonic`)."""
        while not self.attempt(quiet=True):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def take(self, *, shared: bool = False, pause: Pause | None = None) -> None:
        """Lock it for a run; with `pause`, wait for whoever holds it.

        Raises:
            InUseError: another run holds it.
        """
        while not self.attempt(shared=shared):
            self.blocked(pause)

    def blocked(self, pause: Pause | None) -> None:
        """Wait a moment for the holder, and say once that this is so.

        Raises:
            InUseError: there is no `pause`: it is not to be waited for.
        """
        if pause is None:
            raise InUseError(f"{self._what} is in use by {self.holder()}: wait for it, stop it, or use --wait")
        if not self._told:
            self._told = True
            log.warning("waiting: %s is in use by %s", self._what, self.holder())
        pause(_WAIT_POLL_S)

    def sign(self, note: str = "") -> None:
        """Write into the file who holds it, for the message of the next one."""
        me = f"process {os.getpid()} on {socket.gethostname()}{note}\n"
        with suppress(OSError):  # a courtesy; the lock itself does not depend on it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, me.encode(), 0)

    def holder(self) -> str:
        """Say who signed the file last."""
        with suppress(OSError):
            return os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
        return "another process"

    def require_locks(self) -> None:
        """Make sure that there is something to wait for.

        Raises:
            TargetError: the file system has no locks.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise TargetError(
                    f"--wait needs file locks, and the file system of {self._path} has none: "
                    "start the runs one after the other"
                ) from None
            raise


def _open(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        return os.open(path, flags | os.O_RDONLY)  # another user's: flock needs no right to write
    except FileNotFoundError:
        return -1  # a tree that cannot be written, so that there is nothing to keep others from


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold a lock file for a moment, and wait for it."""
    with LockFile(path) as lock:
        lock.wait()
        yield


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold a shared lock while writing, so that a later run can wait for a dead run's last workers."""
    with LockFile(path) as lock:
        lock.attempt(shared=True, quiet=True)
        yield


def wait_for_leases(paths: Iterable[Path]) -> None:
    """Wait until the workers of a run that died have ended; they do so within seconds of their parent.

    Raises:
        TargetError: some still write after 20 s.
    """
    deadline_s = time.monotonic() + _LEASE_WAIT_S
    for path in paths:
        with LockFile(path) as lock:
            if not lock.wait(deadline_s):
                raise TargetError("workers of an earlier run are still writing into the target: end them first")
