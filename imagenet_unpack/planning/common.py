"""What the planners of all kinds of archives share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import ArchiveId, Shard
from imagenet_unpack.sources.tarindex import ReadAt

RUN_BYTES = 64 << 20
"""About how long a run of members is that makes a shard."""

_SHOWN = 5


@contextmanager
def opened(path: Path) -> Iterator[tuple[os.stat_result, ReadAt]]:
    """Open an archive to read its headers.

    Raises:
        ArchiveError: it cannot be opened or read, is empty, or is not a regular file.
    """
    try:
        # A FIFO under the name of an archive must not make the open wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        stat = os.fstat(fd)
        if not S_ISREG(stat.st_mode):
            raise ArchiveError(f"{path}: is not a regular file: an archive belongs there")
        if stat.st_size == 0:
            raise ArchiveError(f"{path}: is empty: download it again")
        # Headers are 100 KB and more apart: reading ahead would only move bytes that nobody looks at.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        def read_at(offset: int, size: int) -> bytes:
            try:
                return os.pread(fd, size, offset)
            except OSError as error:
                raise ArchiveError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error

        yield stat, read_at
    finally:
        os.close(fd)


def identity(path: Path, stat: os.stat_result, headers: str, official: bool) -> ArchiveId:
    """Return what identifies an archive, given the digest of its headers."""
    return ArchiveId(
        path=str(path.absolute()),
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        headers=headers,
        official=official,
    )


def lines_digest(lines: Iterable[str]) -> str:
    """Return the hex digest of some lines."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def largest_first(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Order shards by size, so that the last ones to end are short."""
    return tuple(sorted(shards, key=lambda shard: (-shard.size_bytes, shard.id)))


def few(names: list[str]) -> str:
    """Name the first few for a message, and count the others."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
