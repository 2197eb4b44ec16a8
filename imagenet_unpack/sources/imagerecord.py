"""The record at the end of every image: what it was made from, digests, and what brings an archive back.

It is the last device block (4096 bytes) of the file, behind everything that Linux reads. Two promises rest on it: any
damage of superblock, manifests, tables or of the record itself is found, and an archive that was converted in place is
restored from its image alone.

    magic, length of the JSON object (4 bytes), JSON object, zeros, xxh3-64 of all that (8 bytes)
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import xxhash

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import SPLITS

RECORD_BYTES = 4096
TAR_BLOCK_BYTES = 512
Method = Literal["reflink", "copy", "in-place"]
SQUASHFS_MAGIC = b"hsqs"
_Known = TypeVar("_Known")
_MAGIC = b"imagenet_unpack image\n"
_SCHEMA = 1
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What turns an image that was made in place back into its archive.

    Attributes:
        size_bytes: the archive's size.
        mtime_ns: its modification time.
        first_block: its first 512 bytes.
    """

    size_bytes: int
    mtime_ns: int
    first_block: bytes

    def restore(self, data: bytes, offset: int) -> bytes:
        """Return what was read at an offset as it was before the first block was changed."""
        if offset >= len(self.first_block):
            return data
        return self.first_block[offset : offset + len(data)] + data[len(self.first_block) - offset :]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"size": self.size_bytes, "mtime_ns": self.mtime_ns, "first_block": self.first_block.hex()}

    @classmethod
    def from_json(cls, value: Any) -> Original:
        """Parse the JSON object; raises ValueError, KeyError or TypeError where it is damaged."""
        first_block = bytes.fromhex(value["first_block"])
        if len(first_block) != TAR_BLOCK_BYTES:
            raise ValueError(f"a first block of {len(first_block)} bytes")
        return cls(size_bytes=_amount(value["size"]), mtime_ns=int(value["mtime_ns"]), first_block=first_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldArchive:
    """An official archive that lies in the image as a whole."""

    split: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What an image says of itself.

    Attributes:
        method: how it was made.
        identity: digest of archives, labels and options that it was made from.
        layouts: names of the class folders first, then those of links to them.
        splits: classes, images and bytes of each split.
        official: the splits that were made from the official archives.
        superblock: the first 96 bytes of the image.
        start: where manifests and tables begin.
        end: where they end: here the record begins.
        digest: hex xxh3-64 of all bytes between.
        archives: the official archives that lie in it as they were published.
        original: what it was before, if it was made in place.
    """

    method: Method
    identity: str
    layouts: tuple[str, ...]
    splits: dict[str, tuple[int, int, int]]
    official: tuple[str, ...]
    superblock: bytes
    start: int
    end: int
    digest: str
    archives: tuple[HeldArchive, ...] = ()
    original: Original | None = field(default=None)

    def to_block(self) -> bytes:
        """Return the block."""
        value = {
            "schema": _SCHEMA,
            "method": self.method,
            "identity": self.identity,
            "layouts": self.layouts,
            "splits": self.splits,
            "official": self.official,
            "superblock": self.superblock.hex(),
            "start": self.start,
            "end": self.end,
            "xxh3_64": self.digest,
            "archives": [asdict(archive) for archive in self.archives],
            "original": None if self.original is None else self.original.to_json(),
        }
        text = json.dumps(value).encode()
        data = (_MAGIC + _LENGTH.pack(len(text)) + text).ljust(RECORD_BYTES - _DIGEST_BYTES, b"\0")
        assert len(data) == RECORD_BYTES - _DIGEST_BYTES
        return data + xxhash.xxh3_64_digest(data)

    @classmethod
    def from_block(cls, block: bytes, name: str) -> ImageRecord | None:
        """Parse a block; None where it is not a record.

        Args:
            block: the last `RECORD_BYTES` of a file.
            name: of the file, for messages.

        Raises:
            TargetError: it is a record, but damaged or of a newer version.
        """
        if not block.startswith(_MAGIC):
            return None
        if len(block) != RECORD_BYTES or xxhash.xxh3_64_digest(block[:-_DIGEST_BYTES]) != block[-_DIGEST_BYTES:]:
            raise TargetError(f"{name}: the record at its end is damaged")
        begin = len(_MAGIC) + _LENGTH.size
        (length,) = _LENGTH.unpack(block[len(_MAGIC) : begin])
        try:
            value = json.loads(block[begin : begin + length])
            if value["schema"] != _SCHEMA:
                raise TargetError(f"{name}: was made by a newer version of this program: use that one")
            if not value["splits"]:
                raise ValueError("no splits")
            original = value["original"]
            return cls(
                method=_one_of(value["method"], get_args(Method)),
                identity=str(value["identity"]),
                layouts=tuple(map(str, value["layouts"])),
                splits={
                    _one_of(split, SPLITS): (_amount(classes), _amount(images), _amount(size))
                    for split, (classes, images, size) in dict(value["splits"]).items()
                },
                official=tuple(_one_of(split, SPLITS) for split in value["official"]),
                superblock=bytes.fromhex(value["superblock"]),
                start=_amount(value["start"]),
                end=_amount(value["end"]),
                digest=str(value["xxh3_64"]),
                archives=tuple(
                    HeldArchive(
                        split=_one_of(archive["split"], SPLITS),
                        offset=_amount(archive["offset"]),
                        size_bytes=_amount(archive["size_bytes"]),
                    )
                    for archive in value["archives"]
                ),
                original=None if original is None else Original.from_json(original),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TargetError(f"{name}: the record at its end is damaged") from error


def _amount(value: Any) -> int:
    """Return a size or an offset that a file can have."""
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not an amount")
    return value


def _one_of(value: Any, known: tuple[_Known, ...]) -> _Known:
    for each in known:
        if each == value:
            return each
    raise ValueError(f"{value!r} is none of {known}")


def state_folder(path: Path) -> Path:
    """Return the folder beside an image that holds its state while it is being made or undone."""
    return path.with_name(f".{path.name}.imagenet_unpack")


def read_record(path: Path) -> ImageRecord | None:
    """Return the record at the end of a file, or None where there is none.

    Raises:
        TargetError: it is damaged or of a newer version.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _record_of(fd, path)
    finally:
        os.close(fd)


def is_image(path: Path) -> bool:
    """Say whether a file begins like a squashfs image."""
    with open(path, "rb") as file:
        return file.read(len(SQUASHFS_MAGIC)) == SQUASHFS_MAGIC


def read_original(path: Path) -> Original | None:
    """Return what restores an archive whose conversion, or restoration, was interrupted; None where none was.

    Raises:
        TargetError: the state file is damaged.
    """
    file = state_folder(path) / "original.json"
    try:
        return Original.from_json(json.loads(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TargetError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{file}: is damaged") from error


def original_of(fd: int, path: Path) -> Original | None:
    """Return the archive that an open file was before it was converted in place, wholly or in part; else None.

    Raises:
        TargetError: what says so is damaged.
        OSError: it cannot be read.
    """
    if os.pread(fd, len(SQUASHFS_MAGIC), 0) != SQUASHFS_MAGIC:
        pending = read_original(path)
        same = pending is not None and os.pread(fd, len(pending.first_block), 0) == pending.first_block
        return pending if same else None
    record = _record_of(fd, path)
    return None if record is None else record.original


def _record_of(fd: int, path: Path) -> ImageRecord | None:
    size = os.fstat(fd).st_size
    return ImageRecord.from_block(os.pread(fd, RECORD_BYTES, max(0, size - RECORD_BYTES)), str(path))
