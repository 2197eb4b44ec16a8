"""The exception tree and the exit codes.

A known error carries one line that names what is wrong and what to do; `cli` prints it and ends with the class's
exit code. Errors that cross a process boundary do so as values (`model.ShardFailed`), never as exceptions.
"""

from __future__ import annotations

import errno
from enum import IntEnum

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from typing import ClassVar

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
        exit_code: what the command line ends with.
        summary: what became of the run, where one had begun.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.CANNOT_START
    summary: RunSummary | None = None


class UsageError(UnpackError):
    """A bad option or value."""

    exit_code = ExitCode.USAGE


class ShardsFailedError(UnpackError):
    """Some shards could not be extracted; nothing of their splits was published."""

    exit_code = ExitCode.SHARDS_FAILED


class ArchiveError(UnpackError):
    """An archive is missing, damaged, hostile or not what was asked for."""


class LabelError(UnpackError):
    """A label file is missing, damaged or does not fit the archive."""


class TargetError(UnpackError):
    """The target cannot be used: in use, read-only, no room, or not a folder of ours."""


class CheckError(UnpackError):
    """A published split differs from its record."""

    exit_code = ExitCode.CHECK_DIFFERS


class StoppedError(UnpackError):
    """The run had to stop part way; the same command continues it."""

    exit_code = ExitCode.STOPPED


# Errors of the target that no other shard can escape: the run stops (6) instead of failing shard after shard.
FATAL_TARGET_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.ESHUTDOWN,
        errno.EUCLEAN,
        errno.EACCES,
        errno.EPERM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
    }
)
