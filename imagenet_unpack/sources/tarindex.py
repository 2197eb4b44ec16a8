"""Read tar headers strictly: what is damaged is refused, what an entry is stays for others to judge.

`plain_header` is the fast path for the header that nearly every member has; `read_entry` takes the rest: old v7
headers, the ustar prefix, pax records and GNU long names, base-256 numbers. Both take bytes, neither opens a file, so
the planner (which hops from header to header), the extractor (which has them in its window) and streams share one
reading. Which entries are taken is decided in `sources.members`.

Formats: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.sources import magic

BLOCK = 512
ReadAt = Callable[[int, int], bytes]
"""Read `n` bytes at an absolute offset; fewer only at the end of the file.

It may have an attribute `next_data`: from an offset to the first one at or behind it that is not in a hole.
"""

_ZERO_BLOCK = bytes(BLOCK)
_NO_PREFIX = bytes(155)
_PLAIN_NUMBER = re.compile(rb"[ \0]*[0-7]*[ \0]*")
_OCTAL = re.compile(rb"[ ]*([0-7]+)[ \0]*")
_MAX_EXTENDED = 1 << 20  # a pax or long-name record is a few hundred bytes; more would only cost memory
_NOT_PLAIN = ".@T_"  # where "./", leftovers of operating systems and their folders begin (`sources.members`)
_SCAN = 1 << 20
_ZEROS = bytes(_SCAN)
_MANY_ZEROS = 1 << 20
_SLOW_BYTES = 4 << 30
log = logging.getLogger(__name__)


class CutOffError(ArchiveError):
    """The archive ends before its end-of-archive blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Anything in an archive; offsets and sizes in bytes, `mtime_s` in seconds since the epoch.

    Attributes:
        path: as it is recorded, with its slashes.
        kind: the type flag: b"0" a regular file, b"5" a folder, ...; b"S" also for pax's sparse files.
        header_offset: where its first header begins (that of a pax or long-name record where it has one).
        end: where the next header begins.
    """

    path: str
    kind: bytes
    header_offset: int
    data_offset: int
    size_bytes: int
    mtime_s: float
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfArchive:
    """The end-of-archive blocks were reached.

    Attributes:
        note: what is unusual about them, or "".
    """

    note: str = ""


def plain_header(block: bytes, folder: str = "") -> tuple[str, int, int] | None:
    """Return name, size and modification time of a plain regular-file header, or None where it takes a closer look.

    Plain is a bare name below `folder` ("" or with a slash at its end) that cannot be a leftover of an operating
    system. The checksum is verified. For a block of ASCII bytes the sum stays below 65,521, so the low half of
    Adler-32 is exactly the sum plus one, at a tenth of the cost of summing in Python.
    """
    if block[156] not in b"0\0" or block[257:262] != b"ustar" or block[345:500] != _NO_PREFIX or not block.isascii():
        return None
    size = _OCTAL.fullmatch(block, 124, 136)
    checksum = _OCTAL.fullmatch(block, 148, 156)
    mtime = _OCTAL.fullmatch(block, 136, 148)
    if size is None or checksum is None or mtime is None:
        return None
    total = (zlib.adler32(block) & 0xFFFF) - (zlib.adler32(block[148:156]) & 0xFFFF) + 256
    if total != int(checksum[1], 8):
        return None
    name = block[:100].partition(b"\0")[0].decode("ascii")
    if folder:
        if not name.startswith(folder):
            return None
        name = name[len(folder) :]
    if not name or name[0] in _NOT_PLAIN or not name.isprintable() or "/" in name:
        return None
    return name, int(size[1], 8), int(mtime[1], 8)


def read_entry(read_at: ReadAt, offset: int, end: int, archive: str, *, first: bool = False) -> Entry | EndOfArchive:
    """Read the entry whose header begins at `offset`, with the pax and long-name records before it.

    Offsets that are read only ever grow.

    Args:
        read_at: reads the archive's file.
        offset: absolute offset of the header.
        end: absolute offset behind the tar's last byte; one far behind it where that is not known.
        archive: how messages call the archive.
        first: it is the tar's first one: anything but a tar is named in the error.

    Raises:
        ArchiveError: the header is damaged or cut off, or the entry is.
    """
    start = offset
    overrides: dict[str, str] = {}
    while True:
        block = _read(read_at, offset, BLOCK, end, archive, "a header", first=first)
        if block == _ZERO_BLOCK:
            if overrides:
                raise ArchiveError(f"{archive}: an extended header at byte {start} has no member behind it")
            return _read_end(read_at, offset, end, archive)
        plain = None if overrides else plain_header(block)
        if plain is not None:
            path, size, mtime = plain
            return _entry(path, size, float(mtime), b"0", start, offset, end, archive)
        _verify_checksum(block, offset, archive, first=first)
        kind = block[156:157]
        size = _number(block[124:136], "size", offset, archive)
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _MAX_EXTENDED:
                raise ArchiveError(f"{archive}: the extended header at byte {offset} claims {size:,} bytes: damaged")
            payload = _read(read_at, offset + BLOCK, _padded(size), end, archive, "an extended header")[:size]
            if kind == b"L":
                overrides["path"] = _utf8(payload.rstrip(b"\0"), offset, archive)
            elif kind != b"K":  # K names a link's target; links are refused for what they are
                records = _pax_records(payload, offset, archive)
                if kind == b"g" and records.keys() & {"path", "size"}:
                    raise ArchiveError(f"{archive}: a global pax header at byte {offset} sets names or sizes: damaged")
                if kind == b"x":
                    overrides |= records
            offset += BLOCK + _padded(size)
            continue
        if any(key.startswith("GNU.sparse.") for key in overrides):
            kind = b"S"
        # A long name's header repeats its beginning, cut off in the middle of a character perhaps: it is not looked at.
        path = overrides["path"] if "path" in overrides else _header_name(block, offset, archive)
        if "size" in overrides:
            size = _decimal(overrides["size"], offset, archive)
        mtime_s = float(_number(block[136:148], "modification time", offset, archive, negative=True))
        if kind == b"\0":  # how v7 tar wrote files, and with a slash at the end folders
            kind = b"5" if path.endswith("/") else b"0"
        return _entry(path, size, mtime_s, kind, start, offset, end, archive)


def iter_entries(read_at: ReadAt, offset: int, end: int, archive: str) -> Iterator[Entry | EndOfArchive]:
    """Yield every entry of the tar in `[offset, end)`, then its `EndOfArchive`; errors as in `read_entry`."""
    first = True
    while True:
        entry = read_entry(read_at, offset, end, archive, first=first)
        yield entry
        if isinstance(entry, EndOfArchive):
            return
        offset, first = entry.end, False


def _entry(path: str, size: int, mtime_s: float, kind: bytes, start: int, offset: int, end: int, archive: str) -> Entry:
    data = offset + BLOCK
    if data + size > end:
        raise CutOffError(
            f"{archive}: member {path[:300]!r} at byte {start} needs {data + size - end:,} bytes more than the archive "
            "holds: it is cut off"
        )
    return Entry(
        path=path,
        kind=kind,
        header_offset=start,
        data_offset=data,
        size_bytes=size,
        mtime_s=mtime_s,
        end=min(data + _padded(size), end),
    )


def _read_end(read_at: ReadAt, offset: int, end: int, archive: str) -> EndOfArchive:
    """Check what follows the first end-of-archive block: a second one, then nothing but padding."""
    at = offset + BLOCK
    second = read_at(at, min(BLOCK, end - at)) if end > at else b""
    if not second:
        return EndOfArchive(note="it ends with one end-of-archive block instead of two")
    next_data: Callable[[int], int] | None = getattr(read_at, "next_data", None)
    warned = False
    while at < end:
        if next_data is not None:
            at = next_data(at)
        piece = read_at(at, min(_SCAN, end - at))
        if not piece:
            break
        if piece != (_ZEROS if len(piece) == _SCAN else bytes(len(piece))):
            raise ArchiveError(
                f"{archive}: there are bytes behind its end at byte {offset}: trailing garbage or damage"
            )
        at += len(piece)
        if not warned and at - offset > _SLOW_BYTES:
            warned = True
            log.warning("%s: reading what follows its end at byte %s, only zeros so far", archive, offset)
    zeros = min(at, end) - offset - 2 * BLOCK
    return EndOfArchive(
        note=f"{zeros:,} bytes of zeros follow its end at byte {offset}: an incomplete download looks like this"
        if zeros > _MANY_ZEROS
        else ""
    )


def _read(read_at: ReadAt, offset: int, size: int, end: int, archive: str, what: str, *, first: bool = False) -> bytes:
    data = read_at(offset, min(size, end - offset)) if offset < end else b""
    if len(data) != size:
        if first and data:
            magic.refuse(data, archive)
        raise CutOffError(
            f"{archive}: cut off at byte {offset + len(data)} where {what} or the end-of-archive blocks belong"
        )
    return data


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _verify_checksum(block: bytes, offset: int, archive: str, *, first: bool) -> None:
    """Accept the sum of unsigned bytes, and of signed ones as some old tars wrote it."""
    match = _OCTAL.fullmatch(block[148:156].lstrip(b"\0"))
    rest = block[:148] + b" " * 8 + block[156:]
    excess = None if match is None else sum(rest) - int(match[1], 8)
    if excess is None or (excess and excess != 256 * sum(byte > 127 for byte in rest)):
        if first:
            magic.refuse(block, archive)
        raise ArchiveError(f"{archive}: no valid tar header at byte {offset}: damaged, or not a tar")


def _number(field: bytes, what: str, offset: int, archive: str, *, negative: bool = False) -> int:
    if field[0] in (0x80, 0xFF):  # GNU base-256: two's complement, big endian
        value = int.from_bytes(field[1:], "big") - (1 << 8 * (len(field) - 1) if field[0] == 0xFF else 0)
        if value < 0 and not negative:
            raise ArchiveError(f"{archive}: the header at byte {offset} gives a negative {what}: damaged")
        return value
    if not _PLAIN_NUMBER.fullmatch(field):
        raise ArchiveError(f"{archive}: the header at byte {offset} gives no valid {what}: damaged")
    return int(field.strip(b" \0") or b"0", 8)


def _decimal(text: str, offset: int, archive: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ArchiveError(f"{archive}: the pax header at byte {offset} gives no valid size: damaged")
    return int(text)


def _utf8(raw: bytes, offset: int, archive: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ArchiveError(f"{archive}: the name {raw[:300]!r} at byte {offset} is not UTF-8") from None


def _header_name(block: bytes, offset: int, archive: str) -> str:
    name = block[:100].partition(b"\0")[0]
    # The GNU magic is "ustar  \0"; there, times are where ustar keeps its prefix.
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _utf8(prefix + b"/" + name if prefix else name, offset, archive)


def _pax_records(payload: bytes, offset: int, archive: str) -> dict[str, str]:
    """Parse `LENGTH KEY=VALUE` records, a line each; only keys that matter here must be UTF-8."""
    records: dict[str, str] = {}
    while payload:
        digits, space, _ = payload.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 10 else 0
        record = payload[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n") or length > len(payload):
            raise ArchiveError(f"{archive}: the pax header at byte {offset} is damaged")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
            records[key.decode("utf-8", "replace")] = _utf8(value[:-1], offset, archive)
        payload = payload[length:]
    return records
