"""The superblock and the metadata blocks of a squashfs image, read with all bounds checked; see `sources.squashfs`."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass

from imagenet_unpack.errors import CheckError

MAGIC = b"hsqs"
SUPERBLOCK_BYTES = 96
CONTENT_BYTES = 8192
_ABSENT_TABLE = (1 << 64) - 1
_NO_FRAGMENTS, _NO_XATTRS = 0x10, 0x200
_CACHED_BLOCKS = 16


class ImageError(CheckError):
    """The image is damaged, cut off, or not of this program's making."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """The fields of the superblock that vary; offsets are absolute."""

    inodes: int
    mtime_s: int
    block_size: int
    root: int
    bytes_used: int
    id_table: int
    inode_table: int
    directory_table: int

    @classmethod
    def from_bytes(cls, raw: bytes, file_size: int) -> Superblock:
        """Parse and check the first 96 bytes of an image of `file_size` bytes.

        Raises:
            ImageError: it is not an image, is cut off, or contradicts itself.
        """
        if len(raw) < SUPERBLOCK_BYTES or raw[:4] != MAGIC:
            raise ImageError("not a squashfs image: it does not begin with the squashfs magic")
        inodes, mtime_s, block_size, fragments = struct.unpack_from("<4I", raw, 4)
        compressor, log, flags, ids, major, minor = struct.unpack_from("<6H", raw, 20)
        root, used, id_table, xattrs, inode_table, directory_table, fragment_table, exports = struct.unpack_from(
            "<8Q", raw, 32
        )
        if (major, minor) != (4, 0):
            raise ImageError(f"squashfs version {major}.{minor} is not supported: only 4.0 is")
        if used > file_size:
            raise ImageError(f"cut off: {file_size:,} bytes of at least {used:,}")
        foreign = [compressor != 1, fragments, ids != 1, flags != _NO_FRAGMENTS | _NO_XATTRS]
        if any(foreign) or {xattrs, fragment_table, exports} != {_ABSENT_TABLE}:
            raise ImageError("its superblock is damaged, or another program made the image")
        if not 12 <= log <= 20 or block_size != 1 << log:
            raise ImageError(f"its superblock is damaged: a block size of {block_size:,} bytes")
        if not SUPERBLOCK_BYTES <= inode_table < directory_table < id_table < used or used != id_table + 8:
            raise ImageError("its superblock is damaged: the tables are not in order")
        if not inodes or inodes > (directory_table - inode_table) * 1024:  # no compressor packs an inode so small
            raise ImageError(f"its superblock is damaged: {inodes:,} inodes")
        return cls(
            inodes=inodes,
            mtime_s=mtime_s,
            block_size=block_size,
            root=root,
            bytes_used=used,
            id_table=id_table,
            inode_table=inode_table,
            directory_table=directory_table,
        )


class Table:
    """A table of metadata blocks, read block by block with the last few kept."""

    def __init__(self, fd: int, start: int, end: int, what: str) -> None:
        self._fd, self._start, self._end, self._what = fd, start, end, what
        self._kept: dict[int, tuple[bytes, int]] = {}

    def block(self, at: int) -> tuple[bytes, int]:
        """Return the content of the block at `at`, relative to the table, and where the next one begins."""
        kept = self._kept.get(at)
        if kept is not None:
            return kept
        left = self._end - self._start - at
        raw = os.pread(self._fd, min(CONTENT_BYTES + 2, max(left, 0)), self._start + at)
        if len(raw) < 3:
            raise ImageError(f"the {self._what} is damaged: it has no block at {at}")
        length = int.from_bytes(raw[:2], "little")
        size = length & 0x7FFF
        if not 0 < size <= min(CONTENT_BYTES, len(raw) - 2):
            raise ImageError(f"the {self._what} is damaged: a block of {size} bytes at {at}")
        content = raw[2 : 2 + size]
        if not length & 0x8000:
            content = self._unpack(content, at)
        following = at + 2 + size
        if len(content) != CONTENT_BYTES and following != left + at:
            raise ImageError(f"the {self._what} is damaged: the block at {at} is not full")
        if len(self._kept) >= _CACHED_BLOCKS:
            del self._kept[next(iter(self._kept))]
        self._kept[at] = content, following
        return content, following

    def read(self, at: int, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` in the block at `at` on, over as many blocks as it takes."""
        content, following = self.block(at)
        if offset > len(content):
            raise ImageError(f"the {self._what} is damaged: nothing at {at}, {offset}")
        pieces = [content[offset : offset + size]]
        got = len(pieces[0])
        while got < size:
            content, following = self.block(following)
            pieces.append(content[: size - got])
            got += len(pieces[-1])
        return b"".join(pieces)

    def content_bytes(self) -> int:
        """Read every block and return the length of the whole content."""
        at = total = 0
        while at < self._end - self._start:
            content, at = self.block(at)
            total += len(content)
        return total

    def _unpack(self, data: bytes, at: int) -> bytes:
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(data, CONTENT_BYTES)
            if content and unpacker.eof and not unpacker.unused_data:
                return content
        except zlib.error:
            pass
        raise ImageError(f"the {self._what} is damaged: the block at {at} cannot be decompressed")
