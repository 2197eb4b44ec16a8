"""The reader of zips: runs of stored or deflated members, in the order of their offsets.

Nothing that the zip says of itself is believed: each local header must agree with the central directory, no member may
reach into the next one, decompression stops where a member exceeds its stated size, and CRC-32 is verified on the way.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from imagenet_unpack.dataset.names import is_leftover
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import Shard
from imagenet_unpack.sources import zipindex
from imagenet_unpack.sources.reader import Entry as Member
from imagenet_unpack.sources.reader import ReadPace, SourceError, Write
from imagenet_unpack.sources.tarindex import ReadAt
from imagenet_unpack.sources.windows import WindowedFile

_INPUT_BYTES = 256 << 10  # what is left of a piece of input is copied at each call of the decompressor: keep it small
_OUTPUT_BYTES = 1 << 20
_USUAL_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipRun:
    """Payload of a shard that is a run of members of a zip.

    Attributes:
        directory: offset and length of the slices of the central directory that hold the members' entries.
        folders: paths within the zip of the folders that hold the members, to positions in `Shard.classes`.
        labels: member name to position in `Shard.classes`, for the members that are wanted; None: the folder's.
        members: how many members the run has.
    """

    directory: tuple[tuple[int, int], ...]
    folders: dict[bytes, int]
    labels: dict[str, int] | None
    members: int


class ZipReader:
    """Reads a run of members of a zip."""

    def __init__(self, shard: Shard, pace: ReadPace) -> None:
        assert isinstance(shard.payload, ZipRun)
        self._shard = shard
        self._run = shard.payload
        self._archive = shard.archive.path
        self._file = WindowedFile(shard.archive, pace)
        self._members: list[tuple[int, str, zipindex.Entry]] = []
        self._current = -1

    def __enter__(self) -> ZipReader:
        self._file.open()
        try:
            self._members = planned_members(self._shard, self._file.read_at)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def names(self) -> Iterable[tuple[int, str]]:
        """Return the names that the central directory gives."""
        return ((position, name) for position, name, _ in self._members)

    def members(self) -> Iterator[Member]:
        """Yield the members that are wanted."""
        for current, (position, name, entry) in enumerate(self._members):
            self._current = current
            yield position, name, entry.size_bytes, zipindex.mtime_s(entry)

    def copy(self, fd: int, write: Write) -> int:
        """Decompress the current member to `fd`; its size and CRC-32 are verified."""
        _, _, entry = self._members[self._current]
        following = self._current + 1
        limit = self._members[following][2].header_offset if following < len(self._members) else self._shard.end
        header = self._file.read_at(
            entry.header_offset, max(_USUAL_HEADER_BYTES, zipindex.LOCAL_HEADER_BYTES + len(entry.name))
        )
        data = zipindex.data_offset(header, entry, self._archive)
        if data + entry.compressed_bytes > limit:
            raise self._damaged(entry, "reaches into the next one")
        output = _Output(entry.size_bytes, fd, write)
        if entry.method == zipindex.STORED:
            self._file.copy(data, entry.compressed_bytes, self._shard.end, fd, output.write)
        else:
            decompressor = _Inflate(output)
            try:
                self._file.copy(data, entry.compressed_bytes, self._shard.end, fd, decompressor.write)
            except zlib.error as error:
                raise self._damaged(entry, f"cannot be decompressed ({error})") from None
            if output.left >= 0 and not decompressor.ended:
                raise self._damaged(entry, "cannot be decompressed: its data does not end where it should")
        if output.left:
            raise self._damaged(entry, f"is not the {entry.size_bytes:,} bytes that the directory states")
        if output.crc != entry.crc:
            raise self._damaged(entry, "has another CRC-32 than the directory states")
        return output.digest()

    def finish(self) -> tuple[str, ...]:
        """Verify that the archive has not changed."""
        self._file.verify_unchanged()
        return ()

    def _damaged(self, entry: zipindex.Entry, what: str) -> ArchiveError:
        return ArchiveError(f"{self._archive}: member {zipindex.shown_name(entry)} {what}: the zip is damaged")


def planned_members(shard: Shard, read_at: ReadAt) -> list[tuple[int, str, zipindex.Entry]]:
    """Return the members of a shard in the order of their offsets: position in its classes, name, entry.

    Raises:
        ArchiveError: one cannot be extracted.
        SourceError: the zip has changed since it was planned.
    """
    run, archive = shard.payload, shard.archive.path
    assert isinstance(run, ZipRun)
    found: list[tuple[int, str, zipindex.Entry]] = []
    for offset, length in run.directory:
        for entry in zipindex.parse_entries(read_at(offset, length), offset, archive):
            folder, _, leaf = entry.name.rpartition(b"/")
            position = run.folders.get(folder)
            if position is None or not leaf or not shard.offset <= entry.header_offset < shard.end:
                continue
            name = zipindex.file_name(leaf, archive)
            wanted = position if run.labels is None else run.labels.get(name)
            if wanted is None or is_leftover(name):
                continue
            fault = zipindex.member_fault(entry)
            if fault:
                raise ArchiveError(f"{archive}: member {zipindex.shown_name(entry)} {fault}")
            found.append((wanted, name, entry))
    if len(found) != run.members:
        raise SourceError(f"{archive}: it changed since it was planned: run the same command again")
    found.sort(key=lambda member: member[2].header_offset)
    return found


def member_spans(shard: Shard, read_at: ReadAt) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the shard's members, local headers included; those that touch are one range.

    A member whose header is zeros already, as `--consume` leaves it, is a range of its own, up to its least end.
    """
    begin = end = 0
    for _, _, entry in planned_members(shard, read_at):
        header = read_at(entry.header_offset, zipindex.LOCAL_HEADER_BYTES + len(entry.name))
        if not any(header):
            yield entry.header_offset, entry.least_end - entry.header_offset
            continue
        # Nothing but a data descriptor fits in less than a local header.
        if entry.header_offset >= end + zipindex.LOCAL_HEADER_BYTES:
            if end > begin:
                yield begin, end - begin
            begin = entry.header_offset
        end = zipindex.data_offset(header, entry, shard.archive.path) + entry.compressed_bytes
    if end > begin:
        yield begin, end - begin


class _Output:
    """Writes a member of a stated size, and computes digest and CRC-32; `left` is negative once it is exceeded."""

    def __init__(self, size_bytes: int, fd: int, write: Write) -> None:
        self.left = size_bytes
        self.crc = 0
        self._xxh3 = xxhash.xxh3_64()
        self._fd = fd
        self._write = write

    def write(self, _: int, piece: memoryview) -> None:
        self.left -= len(piece)
        if self.left >= 0:
            self.crc = zipindex.crc32(piece, self.crc)
            self._xxh3.update(piece)
            self._write(self._fd, piece)

    def digest(self) -> int:
        return self._xxh3.intdigest()


class _Inflate:
    """Decompresses what is written to it; never makes more than a piece beyond the size that the output takes."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
        self._excess = False

    @property
    def ended(self) -> bool:
        """Whether the data ended with the last byte that was written."""
        return self._zlib.eof and not self._excess

    def write(self, _: int, view: memoryview) -> None:
        for start in range(0, len(view), _INPUT_BYTES):
            piece: memoryview | bytes = view[start : start + _INPUT_BYTES]
            if self._zlib.eof:
                self._excess = True
                return
            more = True
            while more and self._output.left >= 0:
                limit = min(_OUTPUT_BYTES, self._output.left + 1)
                out = self._zlib.decompress(piece, limit)
                piece = self._zlib.unconsumed_tail
                more = bool(piece) or len(out) == limit  # output may be pending when all input is consumed
                self._output.write(0, memoryview(out))
            self._excess = bool(self._zlib.unused_data)
