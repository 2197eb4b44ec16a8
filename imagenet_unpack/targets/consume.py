"""`--consume`: give the bytes of extracted shards back to the archive's file system, by holes in the archive.

Only contents are freed, never headers that the plan is made from, so the archive can be planned again and a run
continued: of an inner tar everything behind its outer header, of a flat tar the bytes of each image. A shard is freed
when it is journaled, which is after its files were synced. Freeing it again changes nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, StoppedError, UsageError, reason
from imagenet_unpack.model import Shard, SplitPlan
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.tar import TarRun

# include/uapi/linux/falloc.h: punch a hole, keep the size.
_PUNCH_HOLE = 0x01 | 0x02
_TRIAL_BYTES = 1 << 20


def require_possible(plan: SplitPlan) -> None:
    """Make sure that the archive of a plan can be consumed; changes nothing of it.

    Raises:
        UsageError: it is no tar whose shards can be freed one by one.
        ArchiveError: it cannot be written, has other names, or its file system cannot punch holes.
    """
    if plan.files or plan.stream is not None or any(shard.format != "tar" for shard in plan.shards):
        raise UsageError(f"--consume works on the official tars only, not on {plan.archive.path}")
    path = Path(plan.archive.path).resolve()
    try:
        stat = path.stat()
        if not os.access(path, os.W_OK):
            raise ArchiveError(f"{path}: you may not write it, so --consume cannot free its space")
        if stat.st_nlink > 1:
            raise ArchiveError(f"{path}: has {stat.st_nlink} names (hard links): --consume would destroy the others")
        with tempfile.TemporaryFile(dir=path.parent, prefix=".imagenet_unpack-") as file:
            file.write(bytes(_TRIAL_BYTES))
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
            else f"a trial in {path.parent} failed: {reason(error)}"
        )
        raise ArchiveError(f"{path}: {why}, so --consume cannot free its space") from error
    if freed <= 0:
        raise ArchiveError(f"{path}: holes free no space on its file system, so --consume is of no use")


def on_same_file_system(plans: Iterable[SplitPlan], target: Path) -> bool:
    """Say whether what is freed in the archives makes room in the target, which need not exist yet."""
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    device = existing.stat().st_dev
    paths = {plan.archive.path for plan in plans if plan.shards}
    return all(os.path.exists(path) and os.stat(path).st_dev == device for path in paths)


def free(shard: Shard) -> None:
    """Free the bytes of a shard whose files are on the disk.

    Raises:
        StoppedError: the archive cannot be written or read any more.
    """
    path = shard.archive.path
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for offset, size in list(_contents(shard, fd)):
                _punch(fd, offset, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise StoppedError(f"{path}: its space could not be freed: {reason(error)}") from error


def _contents(shard: Shard, fd: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what a shard extracts: a whole inner tar, or the images of a run of members."""
    if not isinstance(shard.payload, TarRun):
        yield shard.offset, shard.size_bytes
        return
    names = shard.payload.labels or {}
    for member in iter_members(
        lambda offset, size: os.pread(fd, size, offset), shard.offset, shard.end, shard.archive.path
    ):
        if not isinstance(member, Member):
            return
        if member.name in names and member.size_bytes:
            yield member.data_offset, member.size_bytes
        if member.end >= shard.end:  # a run of members has no end-of-archive blocks of its own
            return


def _punch(fd: int, offset: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has the latter alone, with 64 bits
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE, offset, size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
