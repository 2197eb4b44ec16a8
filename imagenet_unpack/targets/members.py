"""What one shard of an image holds: name, place, size, time and digest of each member, as columns and as a file.

The file of a shard is written last, by a rename: where it exists, all bytes of the shard have been written (which is
not yet: are on the disk). Columns take 60 bytes an image, where tuples would take 300.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import xxhash

from imagenet_unpack.errors import TargetError

_MAGIC = b"imagenet_unpack members 1\n"
_HEADER = struct.Struct("<26sIIQ")
_DIGEST_BYTES = 8
MAX_MTIME_S = (1 << 32) - 1

Located = tuple[int, bytes, int, int, int, int]
"""Position in `Shard.classes`, name, offset of the bytes, size, modification time in seconds, xxh3-64 digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The members of a shard, sorted by class and name.

    Attributes:
        positions: of their classes in `Shard.classes`.
        names: their names.
        offsets: where their bytes lie, in the archive.
        sizes: their sizes.
        mtimes: their modification times, seconds, at most `MAX_MTIME_S`.
        digests: xxh3-64 of their bytes; empty where these were not read.
    """

    positions: array[int]
    names: list[bytes]
    offsets: array[int]
    sizes: array[int]
    mtimes: array[int]
    digests: array[int]

    @classmethod
    def from_rows(cls, rows: Iterable[Located], *, digests: bool) -> Members:
        """Make the columns from members in any order.

        Raises:
            ValueError: a name occurs twice in a class; it is the error's text.
        """
        ordered = sorted(rows)
        for one, other in pairwise(ordered):
            if one[1] == other[1] and one[0] == other[0]:
                raise ValueError(one[1].decode("utf-8", "replace"))
        positions, names, offsets, sizes, mtimes, found = zip(*ordered, strict=True) if ordered else ((),) * 6
        return cls(
            positions=array("I", positions),
            names=list(names),
            offsets=array("Q", offsets),
            sizes=array("Q", sizes),
            mtimes=array("I", mtimes),
            digests=array("Q", found if digests else ()),
        )

    def __len__(self) -> int:
        return len(self.names)

    def rows(self) -> Iterator[tuple[int, bytes, int, int, int, int | None]]:
        """Yield `Located` rows; digests are None where there are none."""
        digests: Iterable[int | None] = self.digests or [None] * len(self)
        return zip(self.positions, self.names, self.offsets, self.sizes, self.mtimes, digests, strict=True)

    def write(self, path: Path) -> None:
        """Write the file of a shard, by a rename; not synced."""
        names = b"\0".join(self.names)
        data = _HEADER.pack(_MAGIC, len(self), bool(self.digests), len(names)) + b"".join(
            (_little(self.positions), _little(self.offsets), _little(self.sizes), _little(self.mtimes),
             _little(self.digests), names)
        )  # fmt: skip
        partial = path.with_suffix(".tmp")
        partial.write_bytes(data + xxhash.xxh3_64_digest(data))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Members:
        """Read the file of a shard.

        Raises:
            FileNotFoundError: there is none.
            TargetError: it is damaged.
        """
        data = path.read_bytes()
        content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if xxhash.xxh3_64_digest(content) != digest or len(content) < _HEADER.size:
            raise TargetError(f"{path}: damaged: remove it with the folder it is in, then run the same command again")
        magic, count, has_digests, _ = _HEADER.unpack_from(content)
        if magic != _MAGIC:
            raise TargetError(f"{path}: written by another version of this program: finish with that, or remove it")
        at = _HEADER.size
        columns = []
        for code, length in (("I", count), ("Q", count), ("Q", count), ("I", count), ("Q", count * has_digests)):
            column = array(code)
            column.frombytes(content[at : at + length * column.itemsize])
            at += length * column.itemsize
            columns.append(_native(column))
        names = content[at:].split(b"\0") if count else []
        positions, offsets, sizes, mtimes, digests = columns
        return cls(positions=positions, names=names, offsets=offsets, sizes=sizes, mtimes=mtimes, digests=digests)


def _native(column: array[int]) -> array[int]:
    if sys.byteorder == "big":
        column.byteswap()
    return column


def _little(column: array[int]) -> bytes:
    return _native(column[:]).tobytes()
