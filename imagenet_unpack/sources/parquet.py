"""Parquet files with a column `image` of `bytes` and `path`, and a column `label`, as Hugging Face's are.

Only the column chunks that are needed are read, a row group at a time, and images are written from Arrow's buffers. A
parquet file has no checksums of its contents, unless its writer chose to add them; those are verified.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from imagenet_unpack.dataset.names import original_name, split_of_name
from imagenet_unpack.errors import ArchiveError, reason
from imagenet_unpack.model import ANY_TIME, ArchiveId, Shard, SplitName
from imagenet_unpack.sources.members import name_fault
from imagenet_unpack.sources.reader import Entry, ReadPace, SourceError, Write

MAGIC = b"PAR1"
_BATCH_BYTES = 2 << 20  # larger batches are not faster, and Arrow takes several times as much memory
_BYTES, _PATH, _LABEL = "image.bytes", "image.path", "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetRun:
    """Payload of a shard that is a run of row groups.

    Attributes:
        row_groups: their numbers in the file.
        images: how many images of the shard's classes they hold.
    """

    row_groups: tuple[int, ...]
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """What the footer says of a row group.

    Attributes:
        size_bytes: size of all its columns, decompressed: at least the sum of the images' sizes.
    """

    rows: int
    size_bytes: int


class ParquetFile:
    """A parquet file of images; whatever pyarrow says of it is an `ArchiveError` that names the file."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow.parquet as pq  # noqa: PLC0415 - an extra
        except ImportError:
            raise ArchiveError(
                f"{path}: reading parquet files needs pyarrow: pip install 'imagenet_unpack[parquet]'"
            ) from None
        self._path = path
        with self._faults("the file"):
            # Arrow takes paths of Unicode only. A file object costs the interpreter lock at each read.
            source: Any = path if path.isprintable() else open(path, "rb")  # noqa: SIM115 - closed with the rest
            # Buffered: a column chunk is read and decompressed page by page, not as a whole.
            self._file = pq.ParquetFile(
                source, buffer_size=1 << 20, pre_buffer=False, memory_map=False, page_checksum_verification=True
            )
            self._metadata = self._file.metadata
            schema = self._file.schema
            columns = {schema.column(number).path for number in range(len(schema))}
        if missing := [name for name in (_BYTES, _PATH, _LABEL) if name not in columns]:
            self.close()
            raise ArchiveError(
                f"{path}: has no column {missing[0]}: expected `image` (a struct of `bytes` and `path`) and `label`"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)

    @property
    def row_groups(self) -> int:
        """How many row groups it has."""
        return int(self._metadata.num_row_groups)

    def row_group(self, number: int) -> RowGroup:
        """Return what the footer says of a row group."""
        with self._faults(f"row group {number}"):
            # Not its columns' metadata: pyarrow ends the whole process where these are damaged.
            group = self._metadata.row_group(number)
            rows, size_bytes = int(group.num_rows), int(group.total_byte_size)
            if rows < 0 or size_bytes < 0:
                raise ValueError(f"{rows} rows, {size_bytes} bytes")
        return RowGroup(rows=rows, size_bytes=size_bytes)

    def image_span(self, number: int) -> tuple[int, int]:
        """Return offset and size in the file of the images of a row group, which must have been read without a fault.

        Of a damaged footer pyarrow would end the whole process here.
        """
        with self._faults(f"row group {number}"):
            group = self._metadata.row_group(number)
            columns = (group.column(at) for at in range(group.num_columns))
            images = next(column for column in columns if column.path_in_schema == _BYTES)
            pages = (images.dictionary_page_offset, images.data_page_offset)
            return min(int(page) for page in pages if page), int(images.total_compressed_size)

    def names(self, number: int) -> list[tuple[str, str | None, int]]:
        """Return each row's image name, the wnid that was appended to it or None, and its label.

        Raises:
            ArchiveError: the columns cannot be read, or a row has no name that a file can have, or no label.
        """
        with self._faults(f"row group {number}"):
            table = self._file.read_row_group(number, columns=[_PATH, _LABEL], use_threads=False)
            table.validate(full=True)
            paths = table.column("image").combine_chunks().flatten()[0].to_pylist()
            labels = table.column(_LABEL).to_pylist()
        rows = []
        for path, label in zip(paths, labels, strict=True):
            fault = name_fault(path) if isinstance(path, str) else "it has no image.path, which holds its name"
            if not fault and not isinstance(label, int):
                fault = "it has no label" if label is None else f"its label {label!r} is not a class index"
            if fault:
                raise ArchiveError(f"{self._path}: image {path!r} of row group {number} is refused: {fault}")
            rows.append((*original_name(path), label))
        return rows

    def images(self, number: int, at_once: int) -> Generator[memoryview, None, None]:
        """Yield the images of a row group; `at_once` are decoded together, and are valid until the next ones are.

        Raises:
            ArchiveError: the column cannot be read, or a row has no image.
        """
        batches = self._file.iter_batches(at_once, row_groups=[number], columns=[_BYTES], use_threads=False)
        while True:
            with self._faults(f"row group {number}"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
                column = batch.column(0).flatten()[0]
            for value in column:
                if not value.is_valid:
                    raise ArchiveError(f"{self._path}: a row of row group {number} has no image")
                yield memoryview(value.as_buffer())

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except ArchiveError:
            raise
        except OSError as error:
            # Arrow raises OSError for damage too, then without an errno.
            if error.errno:
                raise SourceError(f"{self._path}: cannot be read: {reason(error)}") from error
            raise self._damaged(what, error) from error
        except (ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
            raise self._damaged(what, error) from error

    def _damaged(self, what: str, error: Exception) -> ArchiveError:
        lines = str(error).splitlines() or [repr(error)]
        return ArchiveError(f"{self._path}: {what} is damaged or not a parquet file: {lines[0][:200]}")


def split_of_parquet(path: str) -> SplitName:
    """Return the split that a parquet file belongs to, by the first image name in it.

    Raises:
        ArchiveError: it is damaged, has no image, or none of ImageNet.
    """
    with closing(ParquetFile(path)) as file:
        rows = file.names(0) if file.row_groups else []
    if not rows:
        raise ArchiveError(f"{path}: contains no images")
    split = split_of_name(rows[0][0])
    if split is None:
        raise something_else(path, rows[0][0])
    return split


def something_else(path: str, name: str) -> ArchiveError:
    """Return the error for a file whose images, such as `name`, have no names of ImageNet's."""
    return ArchiveError(f"{path}: is a parquet file of something else than ImageNet-1K: its first image is {name!r}")


def rows_of(shard: Shard) -> int:
    """Return how many rows the row groups of a shard have, of whatever class.

    Raises:
        ArchiveError: the file is damaged.
    """
    assert isinstance(shard.payload, ParquetRun)
    with closing(ParquetFile(shard.archive.path)) as file:
        return sum(file.row_group(number).rows for number in shard.payload.row_groups)


def image_spans(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the images of those row groups of a shard that hold images of its classes alone.

    Raises:
        ArchiveError: the file is damaged.
    """
    assert isinstance(shard.payload, ParquetRun)
    wanted = {ref.index for ref in shard.classes}
    with closing(ParquetFile(shard.archive.path)) as file:
        for number in shard.payload.row_groups:
            if all(label in wanted for _, _, label in file.names(number)):
                yield file.image_span(number)


def footer(data: bytes) -> int:
    """Return the length of the footer from the last 8 bytes of a file, or 0 where these are not a parquet file's."""
    return int.from_bytes(data[:4], "little") + 8 if len(data) == 8 and data[4:] == MAGIC else 0


class ParquetReader:
    """Reads a run of row groups."""

    def __init__(self, shard: Shard, pace: ReadPace) -> None:
        assert isinstance(shard.payload, ParquetRun)
        self._shard = shard
        self._run = shard.payload
        self._pace = pace
        self._positions = {ref.index: position for position, ref in enumerate(shard.classes)}
        self._current = memoryview(b"")
        self._fd = -1

    def __enter__(self) -> ParquetReader:
        archive = self._shard.archive
        try:
            self._fd = os.open(archive.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"{archive.path}: cannot be opened: {reason(error)}") from error
        try:
            self._verify_unchanged(archive)
            self._file = ParquetFile(archive.path)
            self._rows = {number: self._file.names(number) for number in self._run.row_groups}
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._current = memoryview(b"")
        self._file.close()
        os.close(self._fd)

    def names(self) -> Iterable[tuple[int, str]]:
        """Return the names in the row groups, of the shard's classes."""
        for rows in self._rows.values():
            for name, _, label in rows:
                if label in self._positions:
                    yield self._positions[label], name

    def members(self) -> Iterator[Entry]:
        """Yield the images of the shard's classes; a parquet file has no modification times of theirs."""
        count = 0
        mtime_s = os.fstat(self._fd).st_mtime
        for number, rows in self._rows.items():
            group = self._file.row_group(number)
            mean_bytes = max(1, group.size_bytes // max(1, group.rows))
            at_once = max(1, min(group.rows, min(_BATCH_BYTES, self._pace.window_bytes) // mean_bytes))
            images = self._file.images(number, at_once)
            for row, (name, _, label) in enumerate(rows):
                if row % at_once == 0:
                    self._pace.window(mean_bytes * at_once)
                image = next(images, None)
                if image is None:
                    raise ArchiveError(f"{self._shard.archive.path}: row group {number} has fewer images than names")
                position = self._positions.get(label)
                if position is not None:
                    count += 1
                    self._current = image
                    yield position, name, len(image), mtime_s
            images.close()
        # The shard's range is an estimate; what of it is a neighbour's is read again from the disk at worst.
        os.posix_fadvise(self._fd, self._shard.offset, self._shard.size_bytes, os.POSIX_FADV_DONTNEED)
        if count != self._run.images:
            raise SourceError(
                f"{self._shard.archive.path}: it changed since it was planned: run the same command again"
            )

    def copy(self, fd: int, write: Write) -> int:
        """Write the current image."""
        step = self._pace.window_bytes
        for start in range(0, len(self._current), step):
            write(fd, self._current[start : start + step])
        return xxhash.xxh3_64_intdigest(self._current)

    def finish(self) -> tuple[str, ...]:
        """Verify that the file has not changed."""
        self._verify_unchanged(self._shard.archive)
        return ()

    def _verify_unchanged(self, archive: ArchiveId) -> None:
        stat = os.fstat(self._fd)
        mtime_ns = ANY_TIME if archive.mtime_ns == ANY_TIME else stat.st_mtime_ns
        if (stat.st_size, mtime_ns) != (archive.size_bytes, archive.mtime_ns):
            raise SourceError(
                f"{archive.path}: it changed during the run: put the planned archive back, or use --restart"
            )
