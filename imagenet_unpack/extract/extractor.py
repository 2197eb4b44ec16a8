"""The hot loop: one shard of one archive into its class folders.

The archive is read front to back in windows into one reused buffer, and members are written from it, so memory does
not grow with the shard or with the largest image, and no byte is read twice. The manifest part is written last, by a
rename: where it stands, every file of the shard has been written (which is not yet: is on the disk).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import xxhash

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.throttle import WINDOW_BYTES
from imagenet_unpack.model import ArchiveId, Shard, ShardDone
from imagenet_unpack.sources.tarindex import BLOCK, EndOfArchive, plain_header, read_member
from imagenet_unpack.targets import manifest

# Linux 6.14: read through the page cache and drop the pages again (include/uapi/linux/fs.h).
_RWF_DONTCACHE = 0x80
_NO_FLAG = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SourceError(ArchiveError):
    """The archive could not be read: an I/O error, or it is not the file that was planned."""


class Pace(Protocol):
    """What is asked before each step of the loop; each may wait, and may raise to end the shard.

    Attributes:
        window_bytes: how much to read at once, a multiple of the tar block; at most `WINDOW_BYTES` is.
    """

    window_bytes: int

    def window(self, nbytes: int) -> None:
        """Before `nbytes` are read."""

    def create(self) -> None:
        """Before a file is created."""

    def write(self, nbytes: int) -> None:
        """Before `nbytes` are written."""


def extract_shard(
    shard: Shard, tree: Path, part: Path, *, pace: Pace, keep_mtime: bool = False, uncached_writes: bool = False
) -> ShardDone:
    """Write the files of `shard` below `tree` and then its manifest part; safe to repeat from any state.

    Args:
        shard: what to extract.
        tree: the folder that holds the class folders; exists.
        part: where the shard's manifest rows go.
        keep_mtime: give files the members' modification times.
        pace: is asked before each step.
        uncached_writes: leave no page cache behind what is written, where kernel and file system can.

    Raises:
        ArchiveError: the archive is at fault (`SourceError`: reading it is).
        OSError: the target is at fault.
    """
    tree_fd = os.open(tree, _FOLDER)
    try:
        _clear(shard, tree_fd, part)
        with _Source(shard.archive, pace, uncached_writes) as source:
            rows, size_bytes, note = _extract(shard, source, tree_fd, pace, keep_mtime)
            source.verify_unchanged()
    finally:
        os.close(tree_fd)
    rows.sort()
    notes = tuple(f"{shard.id}: {each}" for each in (note, _odd_names(shard, rows)) if each)
    partial = part.with_suffix(".tmp")
    partial.write_bytes(b"".join(rows))
    partial.replace(part)
    return ShardDone(shard=shard.id, split=shard.split, images=len(rows), size_bytes=size_bytes, notes=notes)


def clear_all(shards: Iterable[Shard], tree: Path, part: Callable[[str], Path]) -> None:
    """Remove what earlier attempts at these shards left below `tree`, without starting them."""
    tree_fd = os.open(tree, _FOLDER)
    try:
        for shard in shards:
            _clear(shard, tree_fd, part(shard.id))
    finally:
        os.close(tree_fd)


def read_part(shard: Shard, part: Path) -> ShardDone | None:
    """Return what a manifest part says of its shard, or None where there is none."""
    try:
        lines = part.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    size_bytes = sum(manifest.parse_row(line).size_bytes for line in lines)
    return ShardDone(shard=shard.id, split=shard.split, images=len(lines), size_bytes=size_bytes)


def _clear(shard: Shard, tree_fd: int, part: Path) -> None:
    """Make the class folders and remove what an earlier attempt at this shard left in them."""
    part.unlink(missing_ok=True)
    for ref in shard.classes:
        with contextlib.suppress(FileExistsError):
            os.mkdir(ref.folder, 0o777, dir_fd=tree_fd)
    if shard.labels is None:
        folder_fd = os.open(shard.classes[0].folder, _FOLDER, dir_fd=tree_fd)
        try:
            for name in os.listdir(folder_fd):
                os.unlink(name, dir_fd=folder_fd)
        finally:
            os.close(folder_fd)
        return
    for name, position in shard.labels.items():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{shard.classes[position].folder}/{name}", dir_fd=tree_fd)


def _extract(shard: Shard, source: _Source, tree_fd: int, pace: Pace, keep_mtime: bool) -> tuple[list[bytes], int, str]:
    """Return the manifest rows, the sum of the sizes, and a note on the end of the archive or nothing."""
    labels, classes = shard.labels, shard.classes
    archive, end = f"{shard.archive.path} ({shard.id})" if shard.whole_tar else shard.archive.path, shard.end
    # One folder: open it once and name files relative to it. Many: name them relative to the tree, whose folders are
    # all ours, as a thousand open descriptors could be more than a process may have.
    folder_fd = os.open(classes[0].folder, _FOLDER, dir_fd=tree_fd) if labels is None else os.dup(tree_fd)
    rows: list[bytes] = []
    total = 0
    note = ""
    offset = shard.offset
    try:
        while shard.whole_tar or offset < end:
            plain = plain_header(source.header(offset, end)) if offset + BLOCK <= end else None
            if plain is not None and offset + BLOCK + plain[1] <= end:
                name, size, mtime = plain
                data, following = offset + BLOCK, offset + BLOCK + -(-plain[1] // BLOCK) * BLOCK
            else:
                entry = read_member(source.read_at, offset, end, archive)
                if isinstance(entry, EndOfArchive):
                    note = entry.note
                    break
                name, size, mtime = entry.name, entry.size_bytes, entry.mtime_s  # type: ignore[assignment]
                data, following = entry.data_offset, entry.end
            offset = following
            position = 0 if labels is None else labels.get(name)
            if position is None:  # of a class that was not asked for
                continue
            ref = classes[position]
            path = name if labels is None else f"{ref.folder}/{name}"
            pace.create()
            try:
                fd = os.open(path, _CREATE, 0o644, dir_fd=folder_fd)
            except FileExistsError:
                raise ArchiveError(
                    f"{archive}: member {name!r} stands there twice, or differs from another one only in a way "
                    "that this file system does not tell apart"
                ) from None
            try:
                digest = source.copy(data, size, end, fd)
                if keep_mtime:
                    os.utime(fd, (mtime, mtime))
            finally:
                os.close(fd)
            rows.append(manifest.row(f"{shard.split}/{ref.folder}/{name}", ref.index, ref.wnid, size, digest))
            total += size
    finally:
        os.close(folder_fd)
    if not rows and shard.whole_tar:
        raise ArchiveError(f"{archive}: holds no image at all: the download is damaged")
    if labels is not None and len(rows) != len(labels):
        raise SourceError(f"{archive}: it changed since it was planned: run the same command again")
    return rows, total, note


def _odd_names(shard: Shard, rows: list[bytes]) -> str:
    """Say which members do not look like images of their class, or nothing."""
    prefix = f"/{shard.classes[0].wnid}_".encode() if shard.labels is None else b"/"
    paths = (row.partition(b"\t")[0] for row in rows)
    odd = [path for path in paths if not path.endswith(b".JPEG") or prefix not in path]
    if not odd:
        return ""
    name = odd[0].rpartition(b"/")[2].decode()
    return f"{len(odd)} members do not look like images of their class, such as {name!r}: taken as they are"


@functools.cache
def _buffer() -> mmap.mmap:
    """The process's window, page aligned, touched once and used for every shard."""
    return mmap.mmap(-1, WINDOW_BYTES)


class _Source:
    """An archive, read in windows; errors of the archive are told from those of the target by `SourceError`."""

    def __init__(self, archive: ArchiveId, pace: Pace, uncached_writes: bool) -> None:
        self._archive = archive
        self._pace = pace
        self._window = min(WINDOW_BYTES, pace.window_bytes)
        self._write = self._write_uncached if uncached_writes else _write
        self._view = memoryview(_buffer())
        self._flags = _RWF_DONTCACHE
        self._start = self._stop = 0
        self._fd = -1

    def __enter__(self) -> _Source:
        try:
            self._fd = os.open(self._archive.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"{self._archive.path}: cannot be opened: {error.strerror}") from error
        try:
            self.verify_unchanged()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def verify_unchanged(self) -> None:
        """Raise `SourceError` unless the open file still has the size and time that were planned."""
        stat = os.fstat(self._fd)
        if (stat.st_size, stat.st_mtime_ns) != (self._archive.size_bytes, self._archive.mtime_ns):
            raise SourceError(
                f"{self._archive.path}: it changed during the run: put the planned archive back, or use --restart"
            )

    def read_at(self, offset: int, size: int) -> bytes:
        """Read past the window, for the rare header that needs it."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._failed(error, offset) from error

    def header(self, offset: int, end: int) -> bytes:
        """Return the block at `offset`; offsets and windows are multiples of the block, so it is never split."""
        if not self._start <= offset < self._stop:
            self._load(offset, end)
        at = offset - self._start
        return bytes(self._view[at : at + BLOCK])

    def copy(self, offset: int, size: int, end: int, fd: int) -> int:
        """Write `size` bytes at `offset` to `fd` and return their xxh3-64 digest."""
        if self._start <= offset and offset + size <= self._stop:
            at = offset - self._start
            view = self._view[at : at + size]
            self._pace.write(size)
            self._write(fd, view)
            return xxhash.xxh3_64_intdigest(view)
        digest = xxhash.xxh3_64()
        while size:
            if not self._start <= offset < self._stop:
                self._load(offset, end)
            at = offset - self._start
            view = self._view[at : min(at + size, self._stop - self._start)]
            self._pace.write(len(view))
            self._write(fd, view)
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
        self._start, self._stop = offset, offset + size

    def _read_window(self, offset: int, size: int) -> int:
        done = 0
        while done < size:
            try:
                got = os.preadv(self._fd, [self._view[done:size]], offset + done, self._flags)
            except OSError as error:
                if not self._flags or error.errno not in _NO_FLAG:
                    raise
                self._flags = 0  # an older kernel, or a file system that does not know it
                continue
            if not got:
                break
            done += got
        if not self._flags:
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return done

    def _write_uncached(self, fd: int, view: memoryview) -> None:
        try:
            while len(view):
                view = view[os.pwritev(fd, [view], -1, _RWF_DONTCACHE) :]  # -1: where the file stands (pwritev2(2))
        except OSError as error:
            if error.errno not in _NO_FLAG:
                raise
            self._write = _write
            _write(fd, view)

    def _failed(self, error: OSError, offset: int) -> SourceError:
        return SourceError(f"{self._archive.path}: cannot be read at byte {offset}: {error.strerror}")


def _write(fd: int, view: memoryview) -> None:
    written = os.write(fd, view)
    while written != len(view):
        view = view[written:]
        written = os.write(fd, view)
