"""Read a squashfs 4.0 image strictly: every inode and directory entry, with all bounds checked.

It shares no code with what writes images (`targets.squashfs`), and takes what images of this program consist of: zlib
metadata, no fragments, no extended attributes, no export table, one block list a file. Whatever contradicts the format
or itself is an `ImageError` that names the place; nothing else is raised for damaged content.

Memory does not grow with the number of files, apart from one byte for each inode and the entries of one folder.

Format: "Squashfs Binary Format" (squashfs-tools-ng, doc/format.adoc) and fs/squashfs/squashfs_fs.h of Linux.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imagenet_unpack.sources.squashfs_tables import CONTENT_BYTES, SUPERBLOCK_BYTES, ImageError, Superblock, Table

DEVICE_BLOCK_BYTES = 4096
"""A loop device has whole blocks of this size: Linux cannot read the tables of a file that ends within one."""

_ABSENT = (1 << 32) - 1
_UNPACKED_BIT = 1 << 24
_MAX_DEPTH = 8
_MAX_TARGET_BYTES = 4096
_RUN_ENTRIES = 256
_MAX_RUN_BYTES = 12 + _RUN_ENTRIES * (8 + 256)

_DIRECTORY, _REGULAR, _LINK, _BIG_DIRECTORY, _BIG_REGULAR = 1, 2, 3, 8, 9
_COMMON = struct.Struct("<HHHHII")
_REGULAR_FIELDS = struct.Struct("<QQQIIII")
_DIRECTORY_FIELDS = struct.Struct("<IIHHI")
_BIG_DIRECTORY_FIELDS = struct.Struct("<IIIIHHI")
_RUN = struct.Struct("<III")
_ENTRY = struct.Struct("<HhHH")
_INDEX = struct.Struct("<III")
_WORD = struct.Struct("<I")


class File(NamedTuple):
    """A regular file; a tuple, as there are 1.3 million of them.

    Attributes:
        name: its name, bytes.
        start: offset of its first byte in the image.
        size_bytes: its size.
        mtime_s: its modification time, seconds.
        packed: stored sizes of its blocks where some are compressed, else None: its bytes lie in the image as they are.
    """

    name: bytes
    start: int
    size_bytes: int
    mtime_s: int
    packed: tuple[int, ...] | None


class _Place(NamedTuple):
    """Where the inode of a folder is: block and offset in the inode table, its number and that of its parent."""

    path: tuple[bytes, ...]
    block: int
    offset: int
    number: int
    parent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder and what is in it, sorted by name.

    Attributes:
        path: its path from the root, `()` for the root itself.
        files: its regular files.
        links: its symbolic links, name and target.
        folders: names of its folders.
    """

    path: tuple[bytes, ...]
    files: list[File] = field(default_factory=list)
    links: list[tuple[bytes, bytes]] = field(default_factory=list)
    folders: list[bytes] = field(default_factory=list)


class Image:
    """An open image.

    Args:
        path: the file.

    Raises:
        ImageError: it is not an image of this program, or its superblock is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            self.size_bytes = status.st_size
            self.superblock = Superblock.from_bytes(os.pread(self._fd, SUPERBLOCK_BYTES, 0), self.size_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        own = self.superblock
        self._inodes = Table(self._fd, own.inode_table, own.directory_table, "inode table")
        self._seen = bytearray()
        self._inode_bytes = self._listing_bytes = 0

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def pread(self, size: int, offset: int) -> bytes:
        """Read bytes of the image file."""
        return os.pread(self._fd, size, offset)

    def walk(self, only: bytes | None = None) -> Iterator[Folder]:
        """Yield every folder, the root first, having checked all that can be checked without reading data.

        Args:
            only: of the folders in the root, enter this one alone; then the rest of the tables is not checked.

        Raises:
            ImageError: something is damaged; what was yielded before is sound in itself.
        """
        own = self.superblock
        raw_ids = os.pread(self._fd, own.bytes_used - own.directory_table, own.directory_table)
        id_block = int.from_bytes(raw_ids[-8:], "little") - own.directory_table
        # One id (0) in one block that is not compressed, between the listings and the pointer to it.
        if id_block != len(raw_ids) - 14 or raw_ids[id_block:-8] != b"\x04\x80\0\0\0\0":
            raise ImageError("the id table is damaged")
        listings = Table(self._fd, own.directory_table, own.directory_table + id_block, "directory table")
        self._seen = bytearray(own.inodes + 1)
        self._inode_bytes = self._listing_bytes = 0
        pending = [_Place((), own.root >> 16, own.root & 0xFFFF, 0, own.inodes + 1)]
        while pending:
            folder, found = self._folder(listings, pending.pop())
            yield folder
            pending.extend(each for each in reversed(found) if only is None or each.path[0] == only)
        if only is not None:
            return
        if sum(self._seen) != own.inodes:
            raise ImageError(f"{own.inodes:,} inodes expected, {sum(self._seen):,} found")
        if self._inode_bytes != self._inodes.content_bytes() or self._listing_bytes != listings.content_bytes():
            raise ImageError("its tables hold more than what the folders refer to: damaged")

    def read(self, file: File) -> Iterator[bytes]:
        """Yield the bytes of a file in pieces of at most one block.

        Raises:
            ImageError: a block cannot be decompressed, or the image ends.
        """
        at, left, block_size = file.start, file.size_bytes, self.superblock.block_size
        words = iter(file.packed or ())
        while left:
            size = min(block_size, left)
            word = next(words, size | _UNPACKED_BIT)
            stored = word & ~_UNPACKED_BIT
            data = os.pread(self._fd, stored, at)
            if not word & _UNPACKED_BIT:
                try:
                    data = zlib.decompressobj().decompress(data, block_size)
                except zlib.error:
                    data = b""
            if len(data) != size:
                raise ImageError(f"{file.name.decode('utf-8', 'replace')}: a block of it cannot be read: damaged")
            yield data
            at += stored
            left -= size

    def _folder(self, listings: Table, place: _Place) -> tuple[Folder, list[_Place]]:
        """Read a folder's inode and listing; return it, and where the inodes of its folders are."""
        path, block, offset, number, parent = place
        shown = b"/".join(path).decode("utf-8", "backslashreplace") or "the root"
        kind, mode, own_number, _ = self._common(block, offset)
        if number == 0:  # the root, which no entry names
            number = own_number
            self._mark(number, "the superblock is damaged")
        if kind not in (_DIRECTORY, _BIG_DIRECTORY) or own_number != number or mode & ~0o777:
            raise ImageError(f"the inode of {shown} is damaged")
        index: list[tuple[int, int, bytes]] = []
        if kind == _DIRECTORY:
            raw = self._inodes_at(block, offset + _COMMON.size, _DIRECTORY_FIELDS.size)
            start, links, size, within, its_parent = _DIRECTORY_FIELDS.unpack(raw)
            self._inode_bytes += _COMMON.size + _DIRECTORY_FIELDS.size
        else:
            raw = self._inodes_at(block, offset + _COMMON.size, _BIG_DIRECTORY_FIELDS.size)
            links, size, start, its_parent, count, within, xattr = _BIG_DIRECTORY_FIELDS.unpack(raw)
            if xattr != _ABSENT:
                raise ImageError(f"the inode of {shown} is damaged")
            index, index_bytes = self._index(block, offset + _COMMON.size + _BIG_DIRECTORY_FIELDS.size, count)
            self._inode_bytes += _COMMON.size + _BIG_DIRECTORY_FIELDS.size + index_bytes
        if its_parent != parent or size < 3 or len(path) > _MAX_DEPTH:
            raise ImageError(f"the inode of {shown} is damaged")
        folder = Folder(path=path)
        found = self._listing(listings, folder, start, within, size - 3, index, number, shown)
        if links != 2 + len(folder.folders):
            raise ImageError(f"the inode of {shown} is damaged: {links} links")
        return folder, found

    def _index(self, block: int, offset: int, count: int) -> tuple[list[tuple[int, int, bytes]], int]:
        entries = []
        size = 0
        for _ in range(count):
            at, where, length = _INDEX.unpack(self._inodes_at(block, offset + size, _INDEX.size))
            if length >= 256:
                raise ImageError("the index of a folder is damaged")
            entries.append((at, where, self._inodes_at(block, offset + size + _INDEX.size, length + 1)))
            size += _INDEX.size + length + 1
        return entries, size

    def _inodes_at(self, block: int, offset: int, size: int) -> bytes:
        """Read from the inode table at an offset that may lie in a later block."""
        while offset >= CONTENT_BYTES:
            block, offset = self._inodes.block(block)[1], offset - CONTENT_BYTES
        return self._inodes.read(block, offset, size)

    def _listing(
        self,
        listings: Table,
        folder: Folder,
        block: int,
        offset: int,
        size: int,
        index: list[tuple[int, int, bytes]],
        number: int,
        shown: str,
    ) -> list[_Place]:
        """Read the runs of a listing into `folder`; return where the inodes of its folders are."""
        damage = f"the listing of {shown} is damaged"
        if size and offset >= CONTENT_BYTES:
            raise ImageError(damage)
        places: list[_Place] = []
        last = b""
        done = 0
        expected_index = iter(index)
        previous_block = block
        self._listing_bytes += size
        while done < size:
            if offset == CONTENT_BYTES:
                block, offset = listings.block(block)[1], 0
            # A run is at most 256 entries with names of 256 bytes: what is left of the listing bounds it as well.
            run = listings.read(block, offset, min(size - done, _MAX_RUN_BYTES))
            found, first, last, length = self._run(run, last, folder, number, damage)
            places += found
            if block != previous_block:  # the first run that begins in a metadata block is in the index
                previous_block = block
                if next(expected_index, None) != (done, block, first):
                    raise ImageError(f"the index of {shown} is damaged")
            done += length
            offset += length
            while offset > CONTENT_BYTES:
                block, offset = listings.block(block)[1], offset - CONTENT_BYTES
        if next(expected_index, None) is not None:
            raise ImageError(damage)
        return places

    def _run(
        self, run: bytes, last: bytes, folder: Folder, number: int, damage: str
    ) -> tuple[list[_Place], bytes, bytes, int]:
        """Read the run at the beginning of `run`; return its folders, its first and last name, and its length."""
        places: list[_Place] = []
        if len(run) < _RUN.size:
            raise ImageError(damage)
        count, block, base = _RUN.unpack_from(run)
        if count >= _RUN_ENTRIES:
            raise ImageError(damage)
        inodes, following = self._inodes.block(block)
        at, first = _RUN.size, b""
        for _ in range(count + 1):
            if at + _ENTRY.size > len(run):
                raise ImageError(damage)
            offset, difference, kind, name_size = _ENTRY.unpack_from(run, at)
            start, at = at + _ENTRY.size, at + _ENTRY.size + name_size + 1
            name = run[start:at]
            if (
                at > len(run)
                or name <= last
                or name_size >= 255
                or b"/" in name
                or b"\0" in name
                or offset >= len(inodes)
            ):
                raise ImageError(damage)
            first, last = first or name, name
            entry_number = base + difference
            self._mark(entry_number, damage)
            if kind == _REGULAR:
                folder.files.append(self._file(block, offset, inodes, following, entry_number, name))
            elif kind == _DIRECTORY and name not in (b".", b".."):
                folder.folders.append(name)
                places.append(_Place((*folder.path, name), block, offset, entry_number, number))
            elif kind == _LINK:
                folder.links.append((name, self._link(block, offset, entry_number)))
            else:
                raise ImageError(damage)
        return places, first, last, at

    def _mark(self, number: int, damage: str) -> None:
        if not 0 < number < len(self._seen) or self._seen[number]:
            raise ImageError(f"{damage}: an inode number of {number}")
        self._seen[number] = 1

    def _common(self, block: int, offset: int) -> tuple[int, int, int, int]:
        """Return kind, mode, number and time of an inode."""
        kind, mode, uid, gid, mtime_s, number = _COMMON.unpack(self._inodes.read(block, offset, _COMMON.size))
        if uid or gid:
            raise ImageError(f"inode {number} is damaged: it has an unknown owner")
        return kind, mode, number, mtime_s

    def _file(self, block: int, offset: int, content: bytes, following: int, number: int, name: bytes) -> File:
        """Read a file's inode from `content`, the metadata block at `block`, and check it."""
        own = self.superblock
        size_fixed = _COMMON.size + _REGULAR_FIELDS.size
        if offset + size_fixed + 4 > len(content) and following < own.directory_table - own.inode_table:
            content = content[offset:] + self._inodes.block(following)[0]
            at = 0
        else:
            at = offset
        if at + size_fixed > len(content):
            raise ImageError(f"inode {number} is damaged: it is cut off")
        kind, mode, uid, gid, mtime_s, its_number = _COMMON.unpack_from(content, at)
        start, size, sparse, links, fragment, _, xattr = _REGULAR_FIELDS.unpack_from(content, at + _COMMON.size)
        if kind != _BIG_REGULAR or its_number != number or uid or gid or mode & ~0o777:
            raise ImageError(f"inode {number} is damaged")
        if sparse or links != 1 or fragment != _ABSENT or xattr != _ABSENT or size > own.inode_table:
            raise ImageError(f"inode {number} is damaged")
        count = -(-size // own.block_size)
        self._inode_bytes += size_fixed + 4 * count
        packed: tuple[int, ...] | None = None
        if count == 1 and content[at + size_fixed : at + size_fixed + 4] == _WORD.pack(size | _UNPACKED_BIT):
            stored = size
        else:
            words = struct.unpack(f"<{count}I", self._inodes_at(block, offset + size_fixed, 4 * count))
            stored = self._stored_bytes(words, size, number)
            packed = words if any(not word & _UNPACKED_BIT for word in words) else None
        if (start < SUPERBLOCK_BYTES and size) or start + stored > own.inode_table:
            raise ImageError(f"inode {number} is damaged: its data lies outside of the data area")
        return File(name, start, size, mtime_s, packed)

    def _stored_bytes(self, words: tuple[int, ...], size: int, number: int) -> int:
        """Check a block list and return how many bytes its blocks take."""
        total = 0
        for word in words:
            full = min(size, self.superblock.block_size)
            stored = word & ~_UNPACKED_BIT
            if not 0 < stored <= full or (word & _UNPACKED_BIT and stored != full) or word >> 25:
                raise ImageError(f"inode {number} is damaged: its block list is impossible")
            size -= full
            total += stored
        return total

    def _link(self, block: int, offset: int, number: int) -> bytes:
        kind, mode, its_number, _ = self._common(block, offset)
        links, size = struct.unpack("<II", self._inodes_at(block, offset + _COMMON.size, 8))
        if kind != _LINK or its_number != number or links != 1 or mode & ~0o777 or not 0 < size < _MAX_TARGET_BYTES:
            raise ImageError(f"inode {number} is damaged")
        self._inode_bytes += _COMMON.size + 8 + size
        return self._inodes_at(block, offset + _COMMON.size + 8, size)
