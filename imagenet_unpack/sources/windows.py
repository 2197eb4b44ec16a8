"""A file read front to back in windows: one reused buffer, no page cache left behind, no byte read twice."""

from __future__ import annotations

import errno
import functools
import mmap
import os
from pathlib import Path

import xxhash

from imagenet_unpack.errors import reason
from imagenet_unpack.model import ANY_TIME, ArchiveId
from imagenet_unpack.sources.archive import next_data
from imagenet_unpack.sources.imagerecord import TAR_BLOCK_BYTES, Original, original_of
from imagenet_unpack.sources.reader import WINDOW_BYTES, ReadPace, SourceError, Write

# Linux 6.14: read through the page cache and drop the pages again (include/uapi/linux/fs.h).
RWF_DONTCACHE = 0x80
_PACED_BYTES = 64 << 10
NO_FLAG = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


@functools.cache
def _buffer() -> mmap.mmap:
    """The process's window, page aligned, touched once and used for every shard."""
    return mmap.mmap(-1, WINDOW_BYTES)


class WindowedFile:
    """An archive that is read in windows; what keeps it from being read is a `SourceError`.

    There is one buffer in a process: two of these must not be read in turn.
    """

    def __init__(self, archive: ArchiveId, pace: ReadPace) -> None:
        self._archive = archive
        self._pace = pace
        self._window = min(WINDOW_BYTES, pace.window_bytes)
        self._view = memoryview(_buffer())
        self._flags = RWF_DONTCACHE
        self._start = self._stop = 0
        self._fd = -1
        self._original: Original | None = None

    def open(self) -> None:
        """Open the archive, if it is still the one that was planned."""
        try:
            self._fd = os.open(self._archive.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"{self._archive.path}: cannot be opened: {reason(error)}") from error
        try:
            self.verify_unchanged()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the archive."""
        os.close(self._fd)

    def verify_unchanged(self) -> None:
        """Raise `SourceError` unless the open file still has the size and time that were planned."""
        try:
            stat = os.fstat(self._fd)
        except OSError as error:
            raise SourceError(f"{self._archive.path}: cannot be read: {reason(error)}") from error
        planned = self._archive.size_bytes, self._archive.mtime_ns
        found = stat.st_size, stat.st_mtime_ns if planned[1] != ANY_TIME else ANY_TIME
        if found != planned:
            self._original = original_of(self._fd, Path(self._archive.path))
            if self._original is not None:
                found = self._original.size_bytes, self._original.mtime_ns
        if found != planned:
            raise SourceError(
                f"{self._archive.path}: it changed during the run: put the planned archive back, or use --restart"
            )

    def read_at(self, offset: int, size: int) -> bytes:
        """Read a few bytes: from the window where it holds them, else past it."""
        if self._start <= offset and offset + size <= self._stop:
            at = offset - self._start
            return bytes(self._view[at : at + size])
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._failed(error, offset) from error
        return data if self._original is None else self._original.restore(data, offset)

    def __call__(self, offset: int, size: int) -> bytes:
        """Read past the window, as `tarindex.ReadAt`; large reads are paced like windows and leave no cache behind."""
        if size >= _PACED_BYTES:
            self._pace.window(size)
        data = self.read_at(offset, size)
        if size >= _PACED_BYTES:
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return data

    def next_data(self, offset: int) -> int:
        """Return the first offset at or behind this one that is not in a hole, or the size of the file."""
        return next_data(self._fd, offset)

    def block(self, offset: int, size: int, end: int) -> bytes:
        """Return `size` bytes at `offset`, which must not cross a multiple of the window size."""
        if not self._start <= offset < self._stop:
            self._load(offset, end)
        at = offset - self._start
        return bytes(self._view[at : at + size])

    def copy(self, offset: int, size: int, end: int, fd: int, write: Write) -> int:
        """Write `size` bytes at `offset` to `fd` and return their xxh3-64 digest; windows end at `end`."""
        if self._start <= offset and offset + size <= self._stop:
            at = offset - self._start
            view = self._view[at : at + size]
            write(fd, view)
            return xxhash.xxh3_64_intdigest(view)
        digest = xxhash.xxh3_64()
        while size:
            if not self._start <= offset < self._stop:
                self._load(offset, end)
            at = offset - self._start
            view = self._view[at : min(at + size, self._stop - self._start)]
            write(fd, view)
            digest.update(view)
            offset += len(view)
            size -= len(view)
        return digest.intdigest()

    def _load(self, offset: int, end: int) -> None:
        """Read the window from `offset` to the next multiple of the window size, or to `end`."""
        size = min(self._window - offset % self._window, end - offset)
        self._pace.window(size)
        try:
            got = self._read_window(offset, size)
        except OSError as error:
            raise self._failed(error, offset) from error
        if got != size:
            raise SourceError(f"{self._archive.path}: it ends at byte {offset + got}: cut off during the run")
        if self._original is not None and offset < TAR_BLOCK_BYTES:
            self._view[: TAR_BLOCK_BYTES - offset] = self._original.first_block[offset:]
        self._start, self._stop = offset, offset + size

    def _read_window(self, offset: int, size: int) -> int:
        done = 0
        while done < size:
            try:
                got = os.preadv(self._fd, [self._view[done:size]], offset + done, self._flags)
            except OSError as error:
                if not self._flags or error.errno not in NO_FLAG:
                    raise
                self._flags = 0  # an older kernel, or a file system that does not know it
                continue
            if not got:
                break
            done += got
        if not self._flags:
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return done

    def _failed(self, error: OSError, offset: int) -> SourceError:
        return SourceError(f"{self._archive.path}: cannot be read at byte {offset}: {reason(error)}")
