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


def clone_range(source_fd: int, target_fd: int, offset: int, length: int, shift: int) -> None:
    """Let a range of a file appear in another one without copying it.

    Args:
        source_fd: the file.
        target_fd: the other one.
        offset: where the range begins, a multiple of `ALIGNMENT_BYTES`.
        length: likewise, or up to the end of the file.
        shift: what to add to the offset for the other file, likewise.

    Raises:
        CannotCloneError: these files cannot share extents.
        OSError: any other reason.
    """
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, _RANGE.pack(source_fd, offset, length, offset + shift))
    except OSError as error:
        if error.errno in _REFUSALS:
            raise CannotCloneError from error
        raise
