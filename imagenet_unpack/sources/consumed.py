"""Archives of which `--consume` has freed bytes: what is freed of a shard, and how an archive shows that it was.

Tars are marked (`sources.mark`). Zips and parquet files need no mark: CRC-32 and page headers find zeros, so that they
are never taken for images; they are looked at more closely where they have holes, to say so before a run begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, reason
from imagenet_unpack.model import Shard, SplitPlan
from imagenet_unpack.sources.mark import is_marked, unmarked
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.parquet import ParquetRun, image_spans
from imagenet_unpack.sources.tar import TarRun
from imagenet_unpack.sources.tarindex import BLOCK
from imagenet_unpack.sources.zip import ZipRun, member_spans

Span = tuple[int, int]
"""Offset and size of a byte range of a file."""

_HEAD_BYTES = 16  # no image, header or page begins with so many zeros


def spans(shard: Shard, fd: int) -> Iterator[Span]:
    """Yield what may be freed of a shard: what it extracts, but nothing that a plan is made from.

    Of an inner tar that is everything behind the file's first header; of a flat tar the bytes of each image; of a zip
    its members; of a parquet file the images of the row groups that are extracted as a whole.

    Args:
        shard: of any format that lies in its file in ranges of bytes.
        fd: its file.
    """
    payload = shard.payload
    if isinstance(payload, ZipRun):
        yield from member_spans(shard, lambda offset, size: os.pread(fd, size, offset))
    elif isinstance(payload, ParquetRun):
        yield from image_spans(shard)
    elif isinstance(payload, TarRun):
        yield from _run_spans(shard, payload, fd)
    else:
        begin = max(shard.offset, BLOCK)
        yield begin, shard.end - begin


def _run_spans(shard: Shard, run: TarRun, fd: int) -> Iterator[Span]:
    names = run.labels or {}
    for member in iter_members(
        lambda offset, size: os.pread(fd, size, offset), shard.offset, shard.end, shard.archive.path
    ):
        if not isinstance(member, Member):
            return
        if member.name in names and member.size_bytes:
            yield member.data_offset, member.size_bytes
        if member.end >= shard.end:  # a run of members has no end-of-archive blocks of its own
            return


def require_there(shards: Iterable[Shard]) -> None:
    """Make sure that nothing of what is to be extracted was freed; reads only what may have been.

    Raises:
        ArchiveError: it was, or an archive cannot be read.
    """
    by_path = sorted((shard for shard in shards if shard.archive.path), key=lambda shard: shard.archive.path)
    for path, group in groupby(by_path, key=lambda shard: shard.archive.path):
        try:
            with closing(_File(path)) as file:
                for shard in group:
                    if file.lacks(shard):
                        raise _freed(path)
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error


def require_whole(plan: SplitPlan) -> None:
    """Make sure that nothing of a plan's archives was freed, whether it is to be extracted or not.

    Raises:
        ArchiveError: something was.
    """
    for path in sorted({shard.archive.path for shard in plan.shards}):
        if is_marked(Path(path)):
            raise _freed(path)
    require_there(plan.shards)


def _freed(path: str) -> ArchiveError:
    return ArchiveError(
        f"{path}: --consume has freed bytes of it that are needed now: their images are in the folder that it was "
        "unpacked to; get the archive again, or use that folder"
    )


class _File:
    """A file of which some bytes may have been freed."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        stat = os.fstat(self.fd)
        self._has_holes = stat.st_blocks * 512 < stat.st_size
        self._marked = unmarked(os.pread(self.fd, BLOCK, 0)) is not None

    def close(self) -> None:
        os.close(self.fd)

    def lacks(self, shard: Shard) -> bool:
        """Say whether bytes of a shard were freed; of a zip or a parquet file, the first ones stand for all."""
        if shard.format == "tar":
            return self._marked and any(self._is_freed(at) for at, _ in spans(shard, self.fd))
        if shard.format == "image" or not self._has_holes:  # images are not consumed
            return False
        if isinstance(shard.payload, ZipRun):
            return self._is_freed(shard.offset)
        return any(self._is_freed(at) for at, _ in islice(spans(shard, self.fd), 1))

    def _is_freed(self, offset: int) -> bool:
        return not any(os.pread(self.fd, _HEAD_BYTES, offset))
