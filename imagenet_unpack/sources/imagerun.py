"""An image file as a source: what its record says of it, and the reader of runs of its files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from imagenet_unpack.errors import ArchiveError, TargetError, reason
from imagenet_unpack.model import Shard
from imagenet_unpack.sources.imagerecord import ImageRecord, read_record
from imagenet_unpack.sources.reader import Entry, ReadPace, Write
from imagenet_unpack.sources.windows import WindowedFile

_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRun:
    """Payload of a shard that is a run of files of an image, as columns, in the order of their offsets.

    Attributes:
        positions: of their classes in `Shard.classes`.
        names: their names, with a NUL between them.
        offsets: where their bytes lie in the image.
        sizes: their sizes.
        mtimes: their modification times, seconds.
    """

    positions: array[int]
    names: bytes
    offsets: array[int]
    sizes: array[int]
    mtimes: array[int]

    @property
    def content_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(self.sizes)

    def each_name(self) -> list[str]:
        """Return the names."""
        return self.names.decode().split("\0")


class ImageReader:
    """Reads a run of files of an image."""

    def __init__(self, shard: Shard, pace: ReadPace) -> None:
        assert isinstance(shard.payload, ImageRun)
        self._run = shard.payload
        self._end = shard.end
        self._file = WindowedFile(shard.archive, pace)
        self._offset = self._size_bytes = 0

    def __enter__(self) -> ImageReader:
        self._file.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def names(self) -> Iterable[tuple[int, str]]:
        """Return the names of all files."""
        return zip(self._run.positions, self._run.each_name(), strict=True)

    def members(self) -> Iterator[Entry]:
        """Yield every file."""
        run = self._run
        columns = zip(run.positions, run.each_name(), run.offsets, run.sizes, run.mtimes, strict=True)
        for position, name, self._offset, self._size_bytes, mtime_s in columns:
            yield position, name, self._size_bytes, mtime_s

    def copy(self, fd: int, write: Write) -> int:
        """Write the bytes of the current file."""
        return self._file.copy(self._offset, self._size_bytes, self._end, fd, write)

    def finish(self) -> tuple[str, ...]:
        """Verify that the image has not changed."""
        self._file.verify_unchanged()
        return ()


def verify_tables(path: Path, record: ImageRecord) -> None:
    """Compare superblock, manifests and tables of an image with its record; they have no checksums of their own.

    Raises:
        ArchiveError: they differ, or cannot be read.
    """
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(len(record.superblock))
            at = file.seek(record.start)
            while data := file.read(min(_READ_BYTES, record.end - at)):
                digest.update(data)
                at += len(data)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path}: cannot be read: {error}") from error
    if head != record.superblock or digest.hexdigest() != record.digest:
        raise ArchiveError(f"{path}: the image is damaged: its tables are not the ones that were written")


def record_of(path: Path) -> ImageRecord:
    """Return the record of an image.

    Raises:
        ArchiveError: it has none, as another program made it or it is cut off, or the record is damaged.
    """
    try:
        record = read_record(path)
    except TargetError as error:
        raise ArchiveError(str(error)) from error
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error
    if record is None:
        raise ArchiveError(
            f"{path}: this is a squashfs image that is cut off, or that another program made: mount it, and its files "
            "are the images"
        )
    return record
