"""One large member of a zip as a stream: Kaggle's older zip holds the images as a tar.gz."""

from __future__ import annotations

import io
import os
import zlib
from typing import Any

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources import zipindex
from imagenet_unpack.sources.compressed import RawStream
from imagenet_unpack.sources.tarindex import ReadAt

PATCHED_NAME = b"imagenet_object_localization_patched2019.tar.gz"
_PIECE_BYTES = 256 << 10


def find_patched(read_at: ReadAt, size: int, archive: str) -> tuple[zipindex.Entry, int] | None:
    """Return the entry of `PATCHED_NAME` in a zip and where its data begins, or None if it is not there.

    Raises:
        ArchiveError: the zip is damaged, or the member is encrypted or compressed by an unknown method.
    """
    directory = zipindex.find_directory(read_at, size, archive)
    for entry in zipindex.iter_entries(read_at, directory, archive):
        if entry.name.rpartition(b"/")[2] == PATCHED_NAME:
            fault = zipindex.member_fault(entry)
            if fault:
                raise ArchiveError(f"{archive}: member {zipindex.shown_name(entry)} {fault}")
            header = read_at(entry.header_offset, zipindex.LOCAL_HEADER_BYTES + len(entry.name))
            data = zipindex.data_offset(header, entry, archive)
            if data + entry.compressed_bytes > directory.offset:
                raise ArchiveError(
                    f"{archive}: member {zipindex.shown_name(entry)} reaches into the directory: damaged"
                )
            return entry, data
    return None


def open_patched(fd: int, archive: str, **options: Any) -> MemberStream:
    """Open `PATCHED_NAME` in a zip as a stream.

    Args:
        fd: the zip; is closed with the stream.
        archive: how messages call the zip.
        options: of `RawStream`.

    Raises:
        ArchiveError: it is not there, or the zip is damaged.
    """
    raw = RawStream(fd, archive, **options)
    try:
        found = find_patched(lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size, archive)
        if found is None:
            raise ArchiveError(f"{archive}: does not hold {PATCHED_NAME.decode()}")
        os.lseek(fd, found[1], os.SEEK_SET)
    except BaseException:
        raw.close()
        raise
    return MemberStream(raw, found[0], archive)


class MemberStream(io.RawIOBase):
    """The content of a member, read front to back; size and CRC-32 are verified at its end.

    Attributes:
        taken_bytes: how much of the zip has been read so far.

    Args:
        raw: the zip, positioned where the member's data begins (`find_patched`); is closed with the stream.
        entry: the member.
        archive: how messages call the zip.
    """

    def __init__(self, raw: io.RawIOBase, entry: zipindex.Entry, archive: str) -> None:
        super().__init__()
        self._raw = raw
        self._entry = entry
        self._archive = archive
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if entry.method == zipindex.DEFLATED else None
        self._input = b""
        self.taken_bytes = 0
        self._given_bytes = 0
        self._crc = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer.

        Raises:
            ArchiveError: the member is damaged or cut off.
        """
        view = memoryview(buffer).cast("B")
        size = self._read_stored(view) if self._inflate is None else self._read_deflated(view)
        self._crc = zipindex.crc32(view[:size], self._crc)
        self._given_bytes += size
        if self._given_bytes > self._entry.size_bytes:
            raise self._damaged("is larger than the directory states")
        if not size and len(view):
            if self._given_bytes != self._entry.size_bytes or self.taken_bytes != self._entry.compressed_bytes:
                raise self._damaged("is smaller than the directory states")
            if self._crc != self._entry.crc:
                raise self._damaged("has another CRC-32 than the directory states")
        return size

    def close(self) -> None:
        """Close the zip."""
        self._raw.close()
        super().close()

    def _read_stored(self, view: memoryview) -> int:
        size = self._raw.readinto(view[: self._entry.compressed_bytes - self.taken_bytes]) or 0
        self.taken_bytes += size
        return size

    def _read_deflated(self, view: memoryview) -> int:
        assert self._inflate is not None
        while not self._inflate.eof:
            if not self._input:
                piece = bytearray(min(_PIECE_BYTES, self._entry.compressed_bytes - self.taken_bytes))
                size = self._raw.readinto(piece) or 0
                self.taken_bytes += size
                self._input = bytes(piece[:size])
            last = not self._input
            try:
                out = self._inflate.decompress(self._input, len(view))
            except zlib.error as error:
                raise self._damaged(f"cannot be decompressed ({error})") from None
            self._input = self._inflate.unconsumed_tail
            if out:
                view[: len(out)] = out
                return len(out)
            if last and not self._inflate.eof:
                raise self._damaged("cannot be decompressed: it is cut off")
        return 0

    def _damaged(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self._archive}: member {zipindex.shown_name(self._entry)} {what}: the zip is damaged")
