"""The exception tree and the exit codes.

A known error carries one line that names what is wrong and what to do; `cli` prints it and ends with the class's
exit code. Errors that cross a process boundary do so as values (`model.ShardFailed`), never as exceptions.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from enum import IntEnum

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagenet_unpack.model import RunSummary


class ExitCode(IntEnum):
    """The program's exit codes, each with its description in `--help`; published in the README."""

    description: str

    def __new__(cls, value: int, description: str = "") -> ExitCode:
        """Make a code with its description."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.description = description
        return code

    OK = 0, "done: everything asked for is published and checked"
    DEFECT = 1, "defect: an unexpected error, with a traceback"
    USAGE = 2, "usage: invalid option or value"
    SHARDS_FAILED = 3, "some classes could not be extracted; their split is not published"
    CHECK_DIFFERS = 4, "the check found differences"
    CANNOT_START = 5, "could not start: archive, labels or target missing or unusable"
    STOPPED = 6, "stopped part way: disk full, quota, I/O error, stall timeout"
    SIGINT = 130, "stopped by SIGINT (Ctrl-C); run again to continue"
    SIGTERM = 143, "stopped by SIGTERM; run again to continue"
    SIGUSR1 = 138, "stopped by SIGUSR1; run again to continue"
    SIGUSR2 = 140, "stopped by SIGUSR2; run again to continue"


class UnpackError(Exception):
    """Base of all errors that a user can cause; its text is the whole message.

    Attributes:
        exit_code: what the command line ends with; 5 unless a class says otherwise.
        summary: what became of the run, for errors of `unpack` after it had begun; else None.
    """

    exit_code: ExitCode = ExitCode.CANNOT_START
    summary: RunSummary | None = None


class UsageError(UnpackError):
    """A bad option or value."""

    exit_code = ExitCode.USAGE


class ShardsFailedError(UnpackError):
    """Some shards could not be extracted; nothing of their splits was published."""

    exit_code = ExitCode.SHARDS_FAILED


class ArchiveError(UnpackError):
    """An archive is missing, damaged, hostile or not what was asked for."""


class MissingArchiveError(ArchiveError):
    """The archive of a split is not there; a split that is published can do without it."""


class LabelError(UnpackError):
    """A label file is missing, damaged or does not fit the archive."""


class TargetError(UnpackError):
    """The target cannot be used: in use, read-only, no room, or not a folder of ours."""


class CheckError(UnpackError):
    """A published split differs from its manifest, or the manifest is damaged."""

    exit_code = ExitCode.CHECK_DIFFERS


class StoppedError(UnpackError):
    """The run had to stop part way; run the same command again to continue."""

    exit_code = ExitCode.STOPPED


class HostError(StoppedError):
    """This machine or a limit of the shell is at fault: neither the archive nor the target."""


class CancelledError(Exception):
    """The run was asked to end; nothing is going on that has to be ended in order."""


# The file system is gone, or nothing more can be done with it: no other shard can do better, so the run stops (6)
# instead of failing shard after shard.
_GONE_ERRNOS = frozenset(
    {
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EREMOTEIO,
    }
)
FATAL_SOURCE_ERRNOS = _GONE_ERRNOS
FATAL_TARGET_ERRNOS = _GONE_ERRNOS | {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EUCLEAN,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EEXIST,  # of a file that was removed a moment ago: another run works on the same target
}

# Limits of the host or the shell, whatever file the call was about, and what to do about them.
HOST_REMEDIES = {
    errno.EMFILE: "too many open files: raise the limit (`ulimit -n 1024`) or use fewer --workers",
    errno.ENFILE: "too many open files on this host: close some programs",
    errno.ENOMEM: "out of memory: use fewer --workers or give the job more memory",
    errno.EAGAIN: "this host starts no more processes or threads: raise the limit (`ulimit -u`) or use fewer --workers",
}


def reason(error: BaseException) -> str:
    """Return what went wrong in words; never empty or `None`, as `OSError.strerror` may be."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def host_fault(error: BaseException) -> HostError | None:
    """Return the error to report where a limit of the host is at fault, whatever the call was about; else None."""
    remedy = HOST_REMEDIES.get(error.errno) if isinstance(error, OSError) and error.errno else None
    if isinstance(error, MemoryError):
        remedy = HOST_REMEDIES[errno.ENOMEM]
    elif isinstance(error, RuntimeError) and "new thread" in str(error):
        remedy = HOST_REMEDIES[errno.EAGAIN]
    return HostError(f"{remedy}, then run the same command again") if remedy else None


@contextmanager
def named_os_errors() -> Iterator[None]:
    """Turn an error of the operating system into a known error that names the path, or the limit, that it is about.

    The last resort at the edges: a closed folder or a name that is too long may be met wherever a path is looked at,
    and is not a defect.

    Raises:
        UnpackError: the path and what the system said of it; `HostError`: a limit of the host.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        host = host_fault(error)
        if host is not None:
            raise host from error
        if isinstance(error, FileNotFoundError) and error.filename is None:
            raise UnpackError("the working folder was removed: change to another one, then try again") from error
        if not isinstance(error, OSError) or (error.filename is None and error.errno not in FATAL_TARGET_ERRNOS):
            raise
        if error.filename is None:
            raise UnpackError(f"a file system failed: {reason(error)}") from error
        path = os.fsdecode(error.filename)
        closed = _closed_folder(path) if isinstance(error, PermissionError) else None
        where = f": you may not enter {closed}" if closed else ""
        raise UnpackError(f"{path}: {reason(error)}{where}") from error


def _closed_folder(path: str) -> str | None:
    """Return the first folder on the way to `path` that this user may not enter."""
    parts = os.path.abspath(path).split(os.sep)
    folders = (os.sep.join(parts[:depth]) or os.sep for depth in range(1, len(parts)))
    return next((folder for folder in folders if not os.access(folder, os.X_OK)), None)
