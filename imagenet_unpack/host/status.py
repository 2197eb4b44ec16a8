"""Where workers of one host leave word of the shards they are at: bytes and images so far, what they wait for.

A small file with a slot for each shard, written by the worker that has it and read by the runner a few times a second.
It is for people alone: nothing depends on it, and where a worker cannot see it (on another host) nothing is shown.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass

from imagenet_unpack.host import resources

_SLOTS = 1 << 16
_SLOT = struct.Struct("<qq112s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a worker left: bytes of the shard that were read, images written, and what it waits for, if it does."""

    size_bytes: int
    images: int
    waiting: str


class Board:
    """One side of the file: the runner's, which makes it, or a worker's, which finds it there or goes without."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        with suppress(OSError):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    @classmethod
    def make(cls) -> Board:
        """Make a board in a file of its own; without a place for one, the board stays blank."""
        try:
            fd, path = tempfile.mkstemp(prefix="imagenet_unpack-board-", dir=resources.local_folder())
            os.close(fd)
        except OSError:
            path = ""
        return cls(path)

    def write(self, shard: str, word: Word) -> None:
        """Leave word of a shard."""
        if self._fd >= 0:
            slot = _SLOT.pack(word.size_bytes, word.images, word.waiting.encode()[:112])
            with suppress(OSError):
                os.pwrite(self._fd, slot, _offset(shard))

    def read(self, shard: str) -> Word:
        """Return the last word of a shard."""
        slot = b""
        if self._fd >= 0:
            with suppress(OSError):
                slot = os.pread(self._fd, _SLOT.size, _offset(shard))
        if len(slot) != _SLOT.size:
            return Word(size_bytes=0, images=0, waiting="")
        size_bytes, images, waiting = _SLOT.unpack(slot)
        return Word(size_bytes=size_bytes, images=images, waiting=waiting.rstrip(b"\0").decode("utf-8", "replace"))

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Take the file away."""
        self.close()
        with suppress(OSError):
            os.unlink(self.path)


def _offset(shard: str) -> int:
    return zlib.crc32(shard.encode()) % _SLOTS * _SLOT.size
