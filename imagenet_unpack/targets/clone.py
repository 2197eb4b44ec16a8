"""Sharing extents between files (FICLONERANGE), where the file system can."""

from __future__ import annotations

import errno
import fcntl
import struct

ALIGNMENT_BYTES = 1 << 20
"""A multiple of every file system's block: extents are shared in whole blocks."""

_FICLONERANGE = 0x4020940D  # include/uapi/linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_RANGE = struct.Struct("<qQQQ")
_REFUSALS = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}


class CannotCloneError(Exception):
    """The file system cannot share extents between these files."""


def clone_range(source_fd: int, target_fd: int, offset: int) -> None:
    """Let all of a file appear in another one at `offset`, a multiple of `ALIGNMENT_BYTES`, without copying it.

    Raises:
        CannotCloneError: these files cannot share extents.
        OSError: any other reason.
    """
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, _RANGE.pack(source_fd, 0, 0, offset))
    except OSError as error:
        if error.errno in _REFUSALS:
            raise CannotCloneError from error
        raise
