"""Read a zip's central directory strictly, and compare the local headers with it.

The central directory alone says what a zip holds; each local header must agree with it. Entries are parsed from
pieces of the directory with one `struct` call each, as Kaggle's zip has about 1.4 million of them.

Format: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (zip64
and end records), 4.5.3 (zip64 extra field); Info-ZIP's extra field 0x5455 (UTC modification time).
"""

from __future__ import annotations

import re
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources.members import name_fault
from imagenet_unpack.sources.tarindex import ReadAt

try:
    from isal import isal_zlib as _crc  # 20 GB/s instead of 4; it decompresses JPEG images no faster than zlib
except ImportError:  # no wheel for the machine
    import zlib as _crc  # type: ignore[no-redef]

crc32 = _crc.crc32
STORED = 0
DEFLATED = 8
LOCAL_HEADER_BYTES = 30

# Signature, flags, method, DOS time, CRC-32, both sizes, three lengths, Unix mode, offset; the rest is skipped.
_ENTRY = struct.Struct("<4s4x2H4L3H6xHL")
_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_ENTRY_MAGIC = b"PK\x01\x02"
_LOCAL_MAGIC = b"PK\x03\x04"
_END_MAGIC = b"PK\x05\x06"
_ZIP64_LOCATOR_MAGIC = b"PK\x06\x07"
_ZIP64_END_MAGIC = b"PK\x06\x06"
_USUAL_NAME = re.compile(rb"[A-Za-z][\w.]*").fullmatch
_MAX_COMMENT_BYTES = 0xFFFF
_MAX_ENTRY_BYTES = _ENTRY.size + 3 * 0xFFFF
_PIECE_BYTES = 4 << 20
_IN_ZIP64 = 0xFFFFFFFF
_ONLY_OFFSET = b"\x01\x00\x08\x00"  # the zip64 field of nearly all members behind the first 4 GiB
_ENCRYPTED = 1 << 0 | 1 << 6
_DATA_DESCRIPTOR = 1 << 3
_CRYPTIC = _ENCRYPTED | 1 << 13  # or the directory itself is encrypted
_REGULAR = stat.S_IFREG >> 12
_METHODS = {1: "Shrink", 6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 99: "AES"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Where the central directory lies, in bytes of the file, and how many entries it has."""

    offset: int
    size_bytes: int
    entries: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.size_bytes


class Entry(NamedTuple):
    """An entry of the central directory; offsets and sizes in bytes. A tuple, as there can be millions.

    `at` and `length` say where the entry itself lies; `extra` holds its extra fields.
    """

    at: int
    length: int
    name: bytes
    header_offset: int
    compressed_bytes: int
    size_bytes: int
    crc: int
    method: int
    flags: int
    mode: int
    dos_time: int
    extra: bytes

    @property
    def least_end(self) -> int:
        """Return the offset before which its data cannot end: the local header's extra fields are not counted."""
        return self.header_offset + LOCAL_HEADER_BYTES + len(self.name) + self.compressed_bytes


def find_directory(read_at: ReadAt, size: int, archive: str) -> Directory:
    """Find the central directory of a file of `size` bytes by its end record.

    Raises:
        ArchiveError: there is none (cut off, or not a zip), it is damaged, or it is that of a zip in several pieces.
    """
    tail_offset = max(0, size - _END.size - _MAX_COMMENT_BYTES - _ZIP64_LOCATOR.size)
    tail = read_at(tail_offset, size - tail_offset)
    at = len(tail)
    while (at := tail.rfind(_END_MAGIC, 0, at)) >= 0:
        if at + _END.size <= len(tail):
            _, disk, first_disk, _, entries, directory_bytes, offset, comment = _END.unpack_from(tail, at)
            if at + _END.size + comment == len(tail):
                break
    else:
        raise ArchiveError(
            f"{archive}: no zip directory at its end: the download was cut off or is damaged: continue or repeat it"
        )
    end = tail_offset + at
    if disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF):
        raise ArchiveError(f"{archive}: is the last of several pieces of a zip: join them with `zip -s 0` first")
    locator = tail[at - _ZIP64_LOCATOR.size : at] if at >= _ZIP64_LOCATOR.size else b""
    if locator.startswith(_ZIP64_LOCATOR_MAGIC):
        _, _, end, disks = _ZIP64_LOCATOR.unpack(locator)
        record = read_at(end, _ZIP64_END.size) if end < size else b""
        if len(record) != _ZIP64_END.size or not record.startswith(_ZIP64_END_MAGIC) or disks > 1:
            raise ArchiveError(f"{archive}: its zip64 end record is damaged or in another piece")
        *_, entries, directory_bytes, offset = _ZIP64_END.unpack(record)
    directory = Directory(offset=offset, size_bytes=directory_bytes, entries=entries)
    if directory.end != end:
        raise ArchiveError(
            f"{archive}: its directory should end at byte {directory.end:,}, but its end record is at byte {end:,}: "
            "bytes are missing or were put before it: download it again"
        )
    return directory


def iter_entries(
    read_at: ReadAt, directory: Directory, archive: str, *, seen: Callable[[bytes], None] = lambda _: None
) -> Iterator[Entry]:
    """Yield every entry of the directory, front to back, reading it in pieces of a few MiB.

    Args:
        read_at: reads the archive's file.
        directory: where it lies.
        archive: how messages call the archive.
        seen: is called with each piece of the directory, in order.

    Raises:
        ArchiveError: an entry is damaged, or there are fewer or more than the end record says.
    """
    count = 0
    piece = b""
    base = position = directory.offset
    while position < directory.end:
        fresh = read_at(position, min(_PIECE_BYTES, directory.end - position))
        if not fresh:
            raise ArchiveError(f"{archive}: cut off at byte {position:,}, within its directory")
        seen(fresh)
        base = position - len(piece)
        piece += fresh
        position += len(fresh)
        consumed = 0
        for entry in parse_entries(piece, base, archive, last=position >= directory.end):
            count += 1
            consumed = entry.at + entry.length - base
            yield entry
        if not consumed and len(piece) > _MAX_ENTRY_BYTES:  # pragma: no cover - an entry always fits
            break
        piece = piece[consumed:]
    if piece or count != directory.entries:
        raise ArchiveError(
            f"{archive}: its directory has {count:,} entries instead of {directory.entries:,}: it is damaged"
        )


def parse_entries(data: bytes, base: int, archive: str, *, last: bool = True) -> Iterator[Entry]:
    """Yield the entries that lie whole in `data`, which begins at offset `base` of the file.

    Args:
        data: consecutive entries.
        base: where they lie in the file.
        archive: how messages call the archive.
        last: nothing follows `data`: an entry that is cut off there is damage.

    Raises:
        ArchiveError: an entry is damaged.
    """
    at, end = 0, len(data)
    unpack, fixed = _ENTRY.unpack_from, _ENTRY.size
    while at + fixed <= end:
        (
            magic, flags, method, dos_time, crc, compressed, size, name_bytes, extra_bytes, comment_bytes, mode, offset,
        ) = unpack(data, at)  # fmt: skip
        if magic != _ENTRY_MAGIC:
            raise ArchiveError(f"{archive}: no directory entry at byte {base + at:,}: the zip is damaged")
        name_end = at + fixed + name_bytes
        extra_end = name_end + extra_bytes
        following = extra_end + comment_bytes
        if following > end:
            break
        name, extra = data[at + fixed : name_end], data[name_end:extra_end]
        if offset == _IN_ZIP64 and extra.startswith(_ONLY_OFFSET) and size != _IN_ZIP64 != compressed:
            offset = int.from_bytes(extra[4:12], "little")
        elif _IN_ZIP64 in (size, compressed, offset):
            size, compressed, offset = _zip64_fields(extra, size, compressed, offset, name, archive)
        yield Entry(
            base + at, following - at, name, offset, compressed, size, crc, method, flags, mode, dos_time, extra,
        )  # fmt: skip
        at = following
    if last and at != end:
        raise ArchiveError(f"{archive}: the directory entry at byte {base + at:,} is cut off: the zip is damaged")


def member_fault(entry: Entry) -> str | None:
    """Say what keeps an entry from being a regular file that can be extracted, or None."""
    if entry.method == DEFLATED and entry.mode >> 12 == _REGULAR and not entry.flags & _CRYPTIC:
        return None  # nearly all of them
    kind = stat.S_IFMT(entry.mode)
    if kind not in (0, stat.S_IFREG):
        return "is a symbolic link" if kind == stat.S_IFLNK else "is not a regular file"
    if entry.flags & _CRYPTIC:
        return "is encrypted: decrypt the zip first"
    if entry.method not in (STORED, DEFLATED):
        method = _METHODS.get(entry.method, "unknown")
        return f"has the compression method {entry.method} ({method}); only stored and deflated members are read"
    if entry.method == STORED and entry.compressed_bytes != entry.size_bytes:
        return "is stored, but has two sizes: the zip is damaged"
    return None


def shown_name(entry: Entry) -> str:
    """Return the name for messages, whatever bytes it has."""
    return repr(entry.name.decode("utf-8", "backslashreplace"))


def file_name(raw: bytes, archive: str) -> str:
    """Return the last component of a member's path as a file name.

    Raises:
        ArchiveError: it is not UTF-8, or no file can have it.
    """
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ArchiveError(f"{archive}: the member name {raw!r} is not UTF-8") from None
    fault = None if len(raw) < 128 and _USUAL_NAME(raw) else name_fault(name)
    if fault:
        raise ArchiveError(f"{archive}: member {name!r} is refused: {fault}")
    return name


def data_offset(header: bytes, entry: Entry, archive: str) -> int:
    """Return where the data of `entry` begins, by its local header, which must agree with the directory.

    Args:
        header: the bytes from `entry.header_offset` on: at least the fixed fields and the name.
        entry: the directory's entry.
        archive: how messages call the archive.

    Raises:
        ArchiveError: there is no local header, or it is of another member.
    """
    name_end = LOCAL_HEADER_BYTES + len(entry.name)
    if len(header) < name_end or not header.startswith(_LOCAL_MAGIC):
        raise ArchiveError(f"{archive}: member {shown_name(entry)} has no local header: the zip is damaged")
    _, _, flags, method, _, _, crc, compressed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
    same = header[LOCAL_HEADER_BYTES:name_end] == entry.name and name_bytes == len(entry.name)
    same = same and method == entry.method and not (flags ^ entry.flags) & _ENCRYPTED
    if not flags & _DATA_DESCRIPTOR:  # else these follow the data, and the directory has them
        same = same and crc == entry.crc
        same = same and compressed in (entry.compressed_bytes, _IN_ZIP64) and size in (entry.size_bytes, _IN_ZIP64)
    if not same:
        raise ArchiveError(
            f"{archive}: the local header of member {shown_name(entry)} differs from the directory: the zip is damaged"
        )
    return entry.header_offset + name_end + int(extra_bytes)


def mtime_s(entry: Entry) -> float:
    """Return the modification time: UTC seconds of Info-ZIP's extra field, else the DOS time as local time."""
    for tag, value in _extra_fields(entry.extra):
        if tag == 0x5455 and len(value) >= 5 and value[0] & 1:
            return float(struct.unpack_from("<l", value, 1)[0])
    date, clock = entry.dos_time >> 16, entry.dos_time & 0xFFFF
    fields = (1980 + (date >> 9), date >> 5 & 15 or 1, date & 31 or 1, clock >> 11, clock >> 5 & 63, (clock & 31) * 2)
    return time.mktime((*fields, 0, 0, -1))


def _zip64_fields(
    extra: bytes, size: int, compressed: int, offset: int, name: bytes, archive: str
) -> tuple[int, int, int]:
    """Fill in what the entry leaves to its zip64 extra field, in the order of the specification."""
    value = next((value for tag, value in _extra_fields(extra) if tag == 1), b"")
    numbers = [number for (number,) in struct.iter_unpack("<Q", value[: len(value) // 8 * 8])]
    found = []
    for field in (size, compressed, offset):
        if field == _IN_ZIP64 and not numbers:
            shown = name.decode("utf-8", "backslashreplace")
            raise ArchiveError(f"{archive}: member {shown!r} lacks its zip64 sizes: the zip is damaged")
        found.append(numbers.pop(0) if field == _IN_ZIP64 else field)
    return found[0], found[1], found[2]


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        yield tag, extra[at + 4 : at + 4 + length]
        at += 4 + length
