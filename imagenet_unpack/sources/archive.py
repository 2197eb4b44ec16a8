"""An archive that is opened to read its headers."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from imagenet_unpack.errors import ArchiveError, MissingArchiveError, host_fault, reason
from imagenet_unpack.sources.imagerecord import Original, original_of
from imagenet_unpack.sources.mark import unmarked
from imagenet_unpack.sources.tarindex import BLOCK

_STREAM_BYTES_PER_S = 100e6  # what nearly every storage gives to large reads
_TRIED = 16
_WINDOW_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveStat:
    """Size and modification time of an archive; of one that was converted to an image in place, those it had before."""

    st_size: int
    st_mtime_ns: int


class ArchiveFile:
    """Reads at absolute offsets, as `tarindex.ReadAt`.

    Headers are 100 KB and more apart, so each is read by itself, unless that takes longer than reading all that lies
    between them: where every read costs milliseconds (object stores, disks that seek), large reads are faster.
    """

    def __init__(
        self, path: Path, fd: int, clock: Callable[[], float] = time.perf_counter, *, original: Original | None = None
    ) -> None:
        self._path = path
        self._fd = fd
        self._original = original
        self._clock = clock
        self._reads = 0
        self._elapsed_s = 0.0
        self._first = 0
        self._large = False
        self._window = b""
        self._window_at = 0

    def __call__(self, offset: int, size: int) -> bytes:
        """Read `size` bytes; fewer at the end of the file."""
        if self._large:
            return self._from_window(offset, size)
        began_s = self._clock()
        data = self._pread(offset, size)
        if self._reads <= _TRIED:
            self._judge(offset, self._clock() - began_s)
        return data

    def next_data(self, offset: int) -> int:
        """Return the first offset at or behind this one that is not in a hole, or the size of the file."""
        return next_data(self._fd, offset)

    def _judge(self, offset: int, elapsed_s: float) -> None:
        if self._reads == 0:
            self._first = offset
        self._reads += 1
        self._elapsed_s += elapsed_s
        if self._reads == _TRIED:
            between_s = max(0, offset - self._first) / (_TRIED - 1) / _STREAM_BYTES_PER_S
            self._large = self._elapsed_s / _TRIED > between_s

    def _from_window(self, offset: int, size: int) -> bytes:
        at = offset - self._window_at
        if at < 0 or at + size > len(self._window):
            self._window, self._window_at, at = self._pread(offset, max(size, _WINDOW_BYTES)), offset, 0
        return self._window[at : at + size]

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise ArchiveError(f"{self._path}: cannot be read at byte {offset}: {reason(error)}") from error
        return data if self._original is None else self._original.restore(data, offset)


def next_data(fd: int, offset: int) -> int:
    """Return the first offset at or behind this one that is not in a hole of a file, or the size of the file."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return os.fstat(fd).st_size
        return offset  # a file system that does not tell


@contextmanager
def opened(path: Path) -> Iterator[tuple[ArchiveStat, ArchiveFile]]:
    """Open an archive to read its headers.

    Raises:
        ArchiveError: it cannot be opened or read, is empty, or is not a regular file.
        HostError: a limit of the host keeps it from being opened.
    """
    try:
        # A FIFO under the name of an archive must not make the open wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        fault = host_fault(error)
        if fault is not None:
            raise fault from error
        kind = MissingArchiveError if isinstance(error, FileNotFoundError) else ArchiveError
        raise kind(f"{path}: cannot be opened: {reason(error)}") from error
    try:
        try:
            stat = os.fstat(fd)
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error
        if not S_ISREG(stat.st_mode):
            raise ArchiveError(f"{path}: is not a regular file: an archive belongs there")
        if stat.st_size == 0:
            raise ArchiveError(f"{path}: is empty: download it again")
        # Reading ahead would only move bytes that nobody looks at.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        original = original_of(fd, path)
        if original is None:
            before = unmarked(os.pread(fd, BLOCK, 0))
            if before is not None:  # headers are part of an archive's identity, whatever was freed of it
                original = Original(size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, first_block=before)
        if original is None:
            yield ArchiveStat(st_size=stat.st_size, st_mtime_ns=stat.st_mtime_ns), ArchiveFile(path, fd)
        else:
            shown = ArchiveStat(st_size=original.size_bytes, st_mtime_ns=original.mtime_ns)
            yield shown, ArchiveFile(path, fd, original=original)
    finally:
        os.close(fd)
