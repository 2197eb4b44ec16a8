"""Write the tables of a squashfs 4.0 file system around data that already lies somewhere in the file.

A regular file is described by the byte offset of its first block and by the stored size of each block; bit 24 of a
size marks a block that is not compressed, and blocks may begin at any byte. So the members of a tar archive become
files of a file system without a byte of them being moved.

Order in the file: superblock, data, inode table, directory table, id table. Inodes and listings are written to two
temporary files while folders are walked, so memory grows with the largest folder, not with the number of files. The
same calls give the same bytes.

Format: "Squashfs Binary Format" (squashfs-tools-ng, doc/format.adoc) and fs/squashfs/squashfs_fs.h of Linux.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

BLOCK_SIZE = 128 << 10
"""Of data blocks; most images are one. With 1 MiB, random reads were 20 % slower: Linux reads ahead by the block."""
METADATA_BYTES = 8192

_MAGIC = 0x73717368
_ZLIB = 1
_FLAGS = 0x0010 | 0x0200  # no fragments, no extended attributes
_STORED_METADATA = 0x8000
_STORED_BLOCK = 1 << 24
_NONE = 0xFFFFFFFF
_NO_TABLE = 0xFFFFFFFFFFFFFFFF
_DIRECTORY, _FILE, _SYMLINK = 1, 2, 3
_LARGE_DIRECTORY, _LARGE_FILE = 8, 9
_RUN_ENTRIES = 256
_LEVEL = 6

_SUPERBLOCK = struct.Struct("<5I6H8Q")
_INODE_HEADER = struct.Struct("<4H2I")  # type, mode, uid and gid as positions in the id table, mtime, inode number
_FILE_BODY = struct.Struct("<3Q4I")  # first block, size, sparse bytes, links, fragment, offset in it, xattrs
_ONE_BLOCK_FILE = struct.Struct("<4H2I3Q5I")
_SYMLINK_BODY = struct.Struct("<2I")
_DIRECTORY_BODY = struct.Struct("<2I2HI")  # listing's block, links, size, offset in the block, parent's number
_LARGE_DIRECTORY_BODY = struct.Struct("<4I2HI")
_INDEX_ENTRY = struct.Struct("<3I")
_RUN_HEADER = struct.Struct("<3I")
_ENTRY = struct.Struct("<HhHH")

_FOLDER_MODE, _FILE_MODE, _SYMLINK_MODE = 0o755, 0o644, 0o777


class Appendable(Protocol):
    """What tables are appended to."""

    def write(self, data: bytes, /) -> int:
        """Append all of `data`."""


class _Metadata:
    """A table of metadata blocks: 8 KiB of content each, stored as they are.

    They could be compressed, to a quarter. But opening an image reads two of them, and Linux decompresses them so
    slowly that random reads from a cached image fell from 6,300 to 4,200 images/s.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.buffer = bytearray()
        self.block = 0
        """Where the current block will begin, bytes from the start of the table."""

    def append(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) >= METADATA_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write every full block."""
        while len(self.buffer) >= METADATA_BYTES:
            self._write(bytes(self.buffer[:METADATA_BYTES]))
            del self.buffer[:METADATA_BYTES]

    def close(self) -> int:
        """Write the last block and return the size of the table."""
        if self.buffer:
            self._write(bytes(self.buffer))
            self.buffer.clear()
        return self.block

    def _write(self, content: bytes) -> None:
        data = struct.pack("<H", len(content) | _STORED_METADATA) + content
        self._file.write(data)
        self.block += len(data)


@dataclass(slots=True)
class _Folder:
    """A folder that is being filled; an entry is name, type, block and offset of its inode, and inode number."""

    number: int
    mtime_s: int = 0
    folders: int = 0
    entries: list[tuple[bytes, int, int, int, int]] = field(default_factory=list)


class TableWriter:
    """Writes the tables; folders are opened and closed depth first, and files added to the innermost open one.

    Args:
        inodes: holds the inode table until the end: an empty file, open for reading and writing.
        listings: likewise the directory table.
        block_size: of data blocks, a power of two from 4 KiB to 1 MiB.
    """

    def __init__(self, inodes: BinaryIO, listings: BinaryIO, *, block_size: int = BLOCK_SIZE) -> None:
        self._files = inodes, listings
        self._block_size = block_size
        self._inodes = _Metadata(inodes)
        self._listings = _Metadata(listings)
        self._number = 1
        self._open = [_Folder(number=1)]
        self._names: list[bytes] = []

    def open_folder(self, name: bytes) -> None:
        """Begin a folder; what is added until `close_folder` is in it."""
        self._number += 1
        self._open.append(_Folder(number=self._number))
        self._names.append(name)

    def close_folder(self) -> None:
        """End the innermost open folder; its time is the latest one in it."""
        folder, parent = self._open.pop(), self._open[-1]
        block, offset = self._write_folder(folder, parent.number)
        parent.entries.append((self._names.pop(), _DIRECTORY, block, offset, folder.number))
        parent.folders += 1
        parent.mtime_s = max(parent.mtime_s, folder.mtime_s)

    def add_files(self, files: Iterable[tuple[bytes, int, int, int]]) -> None:
        """Add files whose bytes lie in the image as they are.

        Args:
            files: name, offset in the image, size in bytes, modification time in seconds.
        """
        folder, inodes = self._open[-1], self._inodes
        buffer, pack, add = inodes.buffer, _ONE_BLOCK_FILE.pack, folder.entries.append
        number, block_size, latest = self._number, self._block_size, folder.mtime_s
        for name, start, size, mtime_s in files:
            number += 1
            add((name, _FILE, inodes.block, len(buffer), number))
            if 0 < size <= block_size:
                buffer += pack(
                    _LARGE_FILE, _FILE_MODE, 0, 0, mtime_s, number,
                    start, size, 0, 1, _NONE, 0, _NONE, size | _STORED_BLOCK,
                )  # fmt: skip
            else:
                full, rest = divmod(size, block_size)
                sizes = [block_size | _STORED_BLOCK] * full + ([rest | _STORED_BLOCK] if rest else [])
                buffer += self._file_inode(number, start, size, mtime_s, sizes)
            if len(buffer) >= METADATA_BYTES:
                inodes.flush()
            latest = max(latest, mtime_s)
        self._number, folder.mtime_s = number, latest

    def add_packed_file(self, name: bytes, start: int, size: int, mtime_s: int, stored: list[int]) -> None:
        """Add a file whose blocks were packed by `pack_block` and lie one after another from `start` on.

        Args:
            name: name in the innermost open folder.
            start: offset of its first block in the image.
            size: of the file, bytes.
            mtime_s: modification time, seconds.
            stored: stored size of each block, as `pack_block` returned it.
        """
        self._number += 1
        folder = self._open[-1]
        folder.entries.append((name, _FILE, self._inodes.block, len(self._inodes.buffer), self._number))
        folder.mtime_s = max(folder.mtime_s, mtime_s)
        self._inodes.append(self._file_inode(self._number, start, size, mtime_s, stored))

    def add_link(self, name: bytes, target: bytes, mtime_s: int) -> None:
        """Add a symbolic link."""
        self._number += 1
        folder = self._open[-1]
        folder.entries.append((name, _SYMLINK, self._inodes.block, len(self._inodes.buffer), self._number))
        folder.mtime_s = max(folder.mtime_s, mtime_s)
        header = _INODE_HEADER.pack(_SYMLINK, _SYMLINK_MODE, 0, 0, mtime_s, self._number)
        self._inodes.append(header + _SYMLINK_BODY.pack(1, len(target)) + target)

    def finish(self, file: Appendable, offset: int) -> tuple[bytes, int]:
        """Write the root, append all tables to a file, and return the superblock (96 bytes) and the end of the tables.

        Args:
            file: receives the tables where it stands.
            offset: where in the image that is.
        """
        root = self._open.pop()
        # The root has no parent: Linux and mksquashfs take the number behind the last inode for it.
        block, within = self._write_folder(root, self._number + 1)
        directory_table = offset + self._inodes.close()
        id_block = directory_table + self._listings.close()
        for spool in self._files:
            spool.seek(0)
            shutil.copyfileobj(spool, file, 1 << 20)
        ids = struct.pack("<HI", 4 | _STORED_METADATA, 0)  # one id: root
        file.write(ids + struct.pack("<Q", id_block))
        id_table = id_block + len(ids)
        end = id_table + 8
        superblock = _SUPERBLOCK.pack(
            _MAGIC, self._number, root.mtime_s, self._block_size, 0,
            _ZLIB, self._block_size.bit_length() - 1, _FLAGS, 1, 4, 0,
            block << 16 | within, end, id_table, _NO_TABLE,
            offset, directory_table, _NO_TABLE, _NO_TABLE,
        )  # fmt: skip
        return superblock, end

    @staticmethod
    def _file_inode(number: int, start: int, size: int, mtime_s: int, stored: list[int]) -> bytes:
        return (
            _INODE_HEADER.pack(_LARGE_FILE, _FILE_MODE, 0, 0, mtime_s, number)
            + _FILE_BODY.pack(start, size, 0, 1, _NONE, 0, _NONE)
            + struct.pack(f"<{len(stored)}I", *stored)
        )

    def _write_folder(self, folder: _Folder, parent: int) -> tuple[int, int]:
        """Write listing and inode of a folder, and return block and offset of the inode."""
        start, start_offset = self._listings.block, len(self._listings.buffer)
        size, index = self._write_listing(sorted(folder.entries))
        size += 3  # "." and ".." are not stored; Linux counts them so
        place = self._inodes.block, len(self._inodes.buffer)
        links = 2 + folder.folders
        large = bool(index) or size > 0xFFFF
        kind = _LARGE_DIRECTORY if large else _DIRECTORY
        header = _INODE_HEADER.pack(kind, _FOLDER_MODE, 0, 0, folder.mtime_s, folder.number)
        if large:
            body = _LARGE_DIRECTORY_BODY.pack(links, size, start, parent, len(index), start_offset, _NONE)
            body += b"".join(_INDEX_ENTRY.pack(at, block, len(name) - 1) + name for at, block, name in index)
        else:
            body = _DIRECTORY_BODY.pack(start, links, size, start_offset, parent)
        self._inodes.append(header + body)
        return place

    def _write_listing(
        self, entries: list[tuple[bytes, int, int, int, int]]
    ) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Write a listing in runs that share a block of inodes; return its size and its index.

        The index has, for each further metadata block, the first run that begins in it: offset in the listing, where
        the block begins in the table, and the run's first name. Runs end with their metadata block, so that each block
        has one.
        """
        listings = self._listings
        size = 0
        index: list[tuple[int, int, bytes]] = []
        last_block = listings.block
        at = 0
        while at < len(entries):
            first, _, inode_block, _, base = entries[at]
            if listings.block != last_block:
                last_block = listings.block
                index.append((size, last_block, first))
            room = METADATA_BYTES - len(listings.buffer)
            run = bytearray(_RUN_HEADER.size)
            begin = at
            for name, kind, block, offset, number in entries[at : at + _RUN_ENTRIES]:
                if block != inode_block or not -0x8000 <= number - base <= 0x7FFF or (at > begin and len(run) >= room):
                    break
                run += _ENTRY.pack(offset, number - base, kind, len(name) - 1)
                run += name
                at += 1
            _RUN_HEADER.pack_into(run, 0, at - begin - 1, inode_block, base)
            listings.append(bytes(run))
            size += len(run)
        return size, index


def pack_block(content: bytes) -> tuple[bytes, int]:
    """Return a data block as it is stored, compressed where that makes it smaller, and its size for the block list."""
    packed = zlib.compress(content, _LEVEL)
    return (packed, len(packed)) if len(packed) < len(content) else (content, len(content) | _STORED_BLOCK)
