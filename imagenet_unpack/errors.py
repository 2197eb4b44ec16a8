"""The exception tree and the exit codes.

A known error carries one line that names what is wrong and what to do; `cli` prints it and ends with the class's
exit code. Errors that cross a process boundary do so as values (`model.ShardFailed`), never as exceptions.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """The program's exit codes, as published in the README."""

    OK = 0
    DEFECT = 1
    USAGE = 2
    SHARDS_FAILED = 3
    CHECK_DIFFERS = 4
    CANNOT_START = 5
    STOPPED = 6
    SIGINT = 130
    SIGTERM = 143
    SIGUSR1 = 138
    SIGUSR2 = 140


class UnpackError(Exception):
    """Base of all errors that a user can cause; its text is the whole message."""

    exit_code: ClassVar[ExitCode] = ExitCode.CANNOT_START


class UsageError(UnpackError):
    """A bad option or value."""

    exit_code = ExitCode.USAGE


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
