"""Sharing the extents of archives with an image."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, TargetError
from imagenet_unpack.extract.imaging import copy_range
from imagenet_unpack.model import ArchiveId
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.imageplan import DataArea
from imagenet_unpack.sources.imagerecord import TAR_BLOCK_BYTES, is_image
from imagenet_unpack.targets.clone import ALIGNMENT_BYTES, CannotCloneError, clone_range

_CLONE_BYTES = 256 << 20
_BLOCK_BYTES = 64 << 10  # no smaller than a block of any file system


def first_that_cannot(archives: Iterable[ArchiveId], folder: Path) -> ArchiveId | None:
    """Try whether extents of archives can be shared with a file in `folder`; return the first one of which they cannot.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = folder / "probe"
    fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        for archive in archives:
            try:
                _clone(archive, fd, 0, min(ALIGNMENT_BYTES, archive.size_bytes), 0)
            except CannotCloneError:
                return archive
    finally:
        os.close(fd)
        probe.unlink()
    return None


def cannot_clone(output: Path, archive: ArchiveId) -> TargetError:
    """Return the error that says so."""
    return TargetError(
        f"{output.parent}: cannot share extents with {archive.path}: put both on one XFS or btrfs file system, or use "
        "--method copy"
    )


class Cloning:
    """Lets the archives appear in an image, in a thread beside the reading of headers.

    It goes piece by piece: while a range is being shared the file cannot be written to, and of an archive in many
    extents that takes a while.
    """

    def __init__(self, data: DataArea, target_fd: int, output: Path, cancel: Cancel) -> None:
        self._data = data
        self._target_fd = target_fd
        self._output = output
        self._cancel = cancel
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="clone", daemon=True)
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the piece that is being shared, if the rest is not wanted, or else for the last one."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def result(self) -> None:
        """Wait for the last piece.

        Raises:
            TargetError: these files cannot share extents.
            OSError: any other reason.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        for piece in self._data.pieces:
            try:
                for offset in range(piece.offset, piece.end, _CLONE_BYTES):
                    if self._ended.is_set() or self._cancel.requested:
                        return
                    length = min(_CLONE_BYTES, piece.end - offset)
                    shared = length // _BLOCK_BYTES * _BLOCK_BYTES
                    if shared:
                        _clone(piece.archive, self._target_fd, offset, shared, piece.shift)
                    if shared != length:  # a part of a block can be shared at the end of both files alone
                        end = offset + length
                        copy_range(piece.archive, self._target_fd, offset + shared, end, piece.shift)
                if is_image(Path(piece.archive.path)):  # its first block became a superblock; here it is a tar again
                    copy_range(piece.archive, self._target_fd, piece.offset, TAR_BLOCK_BYTES, piece.shift)
            except CannotCloneError:
                self._error = cannot_clone(self._output, piece.archive)
                return
            except (OSError, ArchiveError) as error:
                self._error = error
                return


def _clone(archive: ArchiveId, target_fd: int, offset: int, length: int, shift: int) -> None:
    fd = os.open(archive.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        clone_range(fd, target_fd, offset, length, shift)
    finally:
        os.close(fd)
