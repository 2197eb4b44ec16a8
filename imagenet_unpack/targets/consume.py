"""`--consume`: give the bytes of extracted shards back to the archive's file system, by holes in the archive.

Only contents are freed, never what the plan is made from, so the archive can be planned again and a run continued. A
shard is freed when it is journaled, which is after its files were synced. Freeing it again changes nothing.

    mark the tar, sync ──▶ free the first block of every range, sync ──▶ free the rest

After a crash in between, whatever is not whole any more begins with zeros in an archive that is marked, so that it is
never taken for an image (`sources.consumed`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, StoppedError, UsageError, reason
from imagenet_unpack.model import Shard, SplitPlan
from imagenet_unpack.sources.consumed import Span, spans
from imagenet_unpack.sources.imagerecord import original_of
from imagenet_unpack.sources.mark import marked, unmarked
from imagenet_unpack.sources.parquet import ParquetRun, rows_of
from imagenet_unpack.sources.tarindex import BLOCK
from imagenet_unpack.targets.durable import file_system_magic

# include/uapi/linux/falloc.h: punch a hole, keep the size.
_PUNCH_HOLE = 0x01 | 0x02
_TRIAL_BYTES = 1 << 20
_FIRST_BYTES = 4096
_EDGE_BYTES = 16 << 10
_BTRFS_MAGIC = 0x9123683E  # include/uapi/linux/magic.h


def require_possible(plan: SplitPlan) -> None:
    """Make sure that the archives of a plan can be consumed; changes nothing of them.

    Raises:
        UsageError: no part of them can be freed before all of it is read.
        ArchiveError: one cannot be written, has other names, is an image, or its file system cannot punch holes.
    """
    if plan.stream is not None:
        raise UsageError(
            f"{plan.archive.path}: can only be read from its beginning to its end, so no part of it can be freed "
            "before: leave out --consume"
        )
    if any(shard.format == "image" for shard in plan.shards):
        raise ArchiveError(f"{plan.archive.path}: is an image, which --consume would destroy: leave out --consume")
    paths = sorted({os.path.realpath(shard.archive.path) for shard in plan.shards})
    for path in paths:
        _require_ours(Path(path), tar=all(shard.format == "tar" for shard in plan.shards))
    for folder in sorted({os.path.dirname(path) for path in paths}):
        _require_holes(Path(folder))
    for shard in plan.shards:
        if isinstance(shard.payload, ParquetRun) and rows_of(shard) != shard.payload.images:
            raise UsageError(
                f"{shard.archive.path}: images of other classes lie between those of --classes, so its row groups "
                "cannot be freed: leave out --consume"
            )


def _require_ours(path: Path, *, tar: bool) -> None:
    try:
        stat = path.stat()
        if not os.access(path, os.W_OK):
            raise ArchiveError(f"{path}: you may not write it, so --consume cannot free its space")
        if stat.st_nlink > 1:
            raise ArchiveError(f"{path}: has {stat.st_nlink} names (hard links): --consume would destroy the others")
        with open(path, "rb") as file:
            if original_of(file.fileno(), path) is not None:
                raise ArchiveError(
                    f"{path}: was made an image in place, which --consume would destroy: `restore` it first"
                )
            block = file.read(BLOCK)
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error
    if tar and unmarked(block) is None and marked(block) is None:
        raise ArchiveError(f"{path}: its first header has no room for a mark, so --consume cannot free its space")


def _require_holes(folder: Path) -> None:
    """Try on a file of our own whether a hole frees space."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".imagenet_unpack-") as file:
            file.write(os.urandom(_TRIAL_BYTES))  # zeros would take no space where the file system compresses
            file.flush()
            os.fsync(file.fileno())
            before = os.fstat(file.fileno()).st_blocks
            _punch(file.fileno(), 0, _TRIAL_BYTES)
            os.fsync(file.fileno())
            freed = before - os.fstat(file.fileno()).st_blocks
    except OSError as error:
        why = (
            "its file system cannot punch holes"
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
            else f"a trial failed: {reason(error)}"
        )
        raise ArchiveError(f"{folder}: {why}, so --consume cannot free the space of archives there") from error
    if freed <= 0:
        raise ArchiveError(f"{folder}: holes free no space on its file system, so --consume is of no use")


def on_same_file_system(plans: Iterable[SplitPlan], target: Path) -> bool:
    """Say whether what is freed in the archives makes room in the target, which need not exist yet."""
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    device = existing.stat().st_dev
    paths = {shard.archive.path for plan in plans for shard in plan.shards}
    return all(os.path.exists(path) and os.stat(path).st_dev == device for path in paths)


def in_order(shards: Iterable[Shard]) -> list[Shard]:
    """Return shards in the order of their offsets, as btrfs frees an extent, of up to 128 MiB, as a whole only."""
    return sorted(shards, key=lambda shard: (shard.archive.path, shard.offset))


def free(shards: Iterable[Shard]) -> None:
    """Free the bytes of shards whose files are on the disk.

    Raises:
        StoppedError: an archive cannot be written or read any more.
    """
    for path, group in groupby(in_order(shards), key=lambda shard: shard.archive.path):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _free(list(group), fd)
            finally:
                os.close(fd)
        except (OSError, ArchiveError) as error:
            raise StoppedError(f"{path}: its space could not be freed: {reason(error)}") from error


def _free(shards: list[Shard], fd: int) -> None:
    ranges = [span for shard in shards for span in spans(shard, fd)]
    if shards[0].format == "tar":
        _mark(fd)
    for offset, size in ranges:
        _punch(fd, offset, min(size, _FIRST_BYTES))
    os.fsync(fd)
    for offset, size in ranges:
        if size > _FIRST_BYTES:
            _punch(fd, offset + _FIRST_BYTES, size - _FIRST_BYTES)
    if file_system_magic(Path(shards[0].archive.path)) == _BTRFS_MAGIC:
        _move_edges(fd, ranges)


def _move_edges(fd: int, ranges: list[Span]) -> None:
    """Write again, as it is, what lies beside freed ranges: headers, the end of an archive, columns of names.

    btrfs frees an extent, of up to 128 MiB, when no block of it is in use; what is written again lies in another one.
    """
    starts = [offset for offset, _ in ranges[1:]] + [os.fstat(fd).st_size]
    for (offset, size), following in zip(ranges, starts, strict=True):
        end = offset + size
        for at, length in ((offset - 1, 1), (end, min(following - end, _EDGE_BYTES))):
            if length > 0:
                os.pwrite(fd, os.pread(fd, length, at), at)


def _mark(fd: int) -> None:
    block = marked(os.pread(fd, BLOCK, 0))
    if block is not None:
        os.pwrite(fd, block, 0)
        os.fsync(fd)


def _punch(fd: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has the latter alone, with 64 bits
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE, offset, size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
