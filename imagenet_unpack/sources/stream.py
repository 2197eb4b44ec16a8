"""A tar that is read once, front to back: a compressed file, or standard input.

It cannot be cut into shards beforehand, so it is cut as it comes, at about `STRETCH_BYTES`: a stretch is a run of whole
members, held in memory until its files are written. Where it is cut depends on the archive alone, not on what is wanted
of it, on how it is compressed or in what pieces it comes, so that a stretch has the same number each time it is read.

    a tar of `<wnid>.tar`         a stretch begins with each inner tar, and after each `STRETCH_BYTES` of it
    any other tar                 a stretch begins after each `STRETCH_BYTES`
"""

from __future__ import annotations

import functools
import mmap
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import xxhash

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import ClassRef, Shard, SplitName
from imagenet_unpack.sources.compressed import StreamCutError, StreamReadError
from imagenet_unpack.sources.magic import ImageKinds
from imagenet_unpack.sources.members import Members
from imagenet_unpack.sources.reader import Entry as ReaderEntry
from imagenet_unpack.sources.reader import ReadPace, Write
from imagenet_unpack.sources.tarindex import BLOCK, EndOfArchive, Entry, read_entry

STRETCH_BYTES = 64 << 20
_SLACK_BYTES = 4 << 20  # for headers behind a full stretch, and what is read ahead
_READ_BYTES = 1 << 20
_FORGET_BYTES = 8 << 20
_UNKNOWN_END = 1 << 62
_MAX_MEMBER_BYTES = 1 << 30  # the largest image of ImageNet has 15 MB; a member is held in memory as a whole
_BUCKETS = 1 << 12
_WAIT_S = 0.2


class Source(Protocol):
    """Where the bytes come from; `sources.compressed.Decompressed`."""

    def readinto(self, view: memoryview) -> int:
        """Read some bytes; 0 at the end."""


class Buffer:
    """Memory for one stretch, shared by the shards that are made from it."""

    def __init__(self, capacity: int) -> None:
        self.view = memoryview(mmap.mmap(-1, capacity))
        self.users = 0


class Buffers:
    """At most `count` buffers: who wants another one waits until the files of one have been written.

    Args:
        count: at least 2, for one that is filled while another is written.
        check: is called while waiting; may raise to end it.
    """

    def __init__(self, count: int, check: Callable[[], None] = lambda: None) -> None:
        self._left = count
        self._free: list[Buffer] = []
        self._check = check
        self._condition = threading.Condition()

    def take(self) -> Buffer:
        """Return a buffer for a stretch."""
        with self._condition:
            while not (self._free or self._left):
                self._check()
                self._condition.wait(_WAIT_S)
            if self._free:
                return self._free.pop()
            self._left -= 1
        return Buffer(STRETCH_BYTES + _SLACK_BYTES)

    def release(self, buffer: Buffer) -> None:
        """Give back a buffer, or one user's share in it."""
        with self._condition:
            buffer.users -= 1
            if buffer.users <= 0:
                if len(buffer.view) == STRETCH_BYTES + _SLACK_BYTES:
                    self._free.append(buffer)
                else:  # one that had to grow
                    self._left += 1
                self._condition.notify()


class Window:
    """The part of a stream that is in memory: from `base` on, as far as it has been read.

    Offsets that are read only ever grow. What lies before them is forgotten now and then, unless it is kept.

    Attributes:
        base: offset of the first byte in memory.
        kept: whether what is in memory is still needed.
        ended: whether the stream has been read to its end.
    """

    def __init__(self, source: Source, buffers: Buffers, name: str) -> None:
        self._source = source
        self._buffers = buffers
        self._name = name
        self._buffer = buffers.take()
        self._filled = 0
        self.base = 0
        self.kept = False
        self.ended = False

    def read_at(self, offset: int, size: int) -> bytes:
        """Read bytes at an offset, fewer only at the end of the stream."""
        if not self.kept and offset - self.base > _FORGET_BYTES:
            self.discard(offset)
        at = offset - self.base
        self._fill(at + size)
        return bytes(self._buffer.view[at : min(at + size, self._filled)])

    def load(self, entry: Entry) -> int:
        """Read a member's bytes and return where in the buffer they lie.

        Raises:
            StreamCutError: the stream ends before they do.
            ArchiveError: the member is too large to be an image.
        """
        if entry.size_bytes > _MAX_MEMBER_BYTES:
            raise ArchiveError(
                f"{self._name}: member {entry.path[:300]!r} at byte {entry.header_offset:,} has {entry.size_bytes:,} "
                "bytes: no image is so large"
            )
        at = entry.data_offset - self.base
        self._fill(at + entry.size_bytes)
        missing = at + entry.size_bytes - self._filled
        if missing > 0:
            raise StreamCutError(
                f"{self._name}: the stream ends too early: member {entry.path[:300]!r} at byte "
                f"{entry.header_offset:,} lacks {missing:,} bytes"
            )
        return at

    def cut(self, offset: int) -> Buffer:
        """Hand out what lies before an offset that has been read, and go on in another buffer."""
        full, self._buffer = self._buffer, self._buffers.take()
        rest = full.view[offset - self.base : self._filled]
        if len(rest) > len(self._buffer.view):
            self._buffer = Buffer(len(rest))
        self._buffer.view[: len(rest)] = rest
        self._filled = len(rest)
        self.base = offset
        self.kept = False
        return full

    def close(self) -> None:
        """Give the memory back."""
        self._buffers.release(self._buffer)

    def discard(self, offset: int) -> None:
        """Forget what lies before an offset, reading on to it; `base` stays before it where the stream ends before."""
        if offset <= self.base:
            return
        self.kept = False
        while offset > self.base + self._filled and not self.ended:
            self.base += self._filled
            self._filled = 0
            self._fill(min(offset - self.base, _READ_BYTES))
        at = min(offset - self.base, self._filled)
        rest = self._buffer.view[at : self._filled]
        self._buffer.view[: len(rest)] = rest
        self.base, self._filled = self.base + at, len(rest)

    def _fill(self, size: int) -> None:
        """Read until `size` bytes are in memory, or the stream ends."""
        if size > len(self._buffer.view):
            larger = Buffer(size + _READ_BYTES)
            larger.view[: self._filled] = self._buffer.view[: self._filled]
            self._buffer = larger
        while self._filled < size and not self.ended:
            got = self._source.readinto(self._buffer.view[self._filled : self._filled + _READ_BYTES])
            self._filled += got
            self.ended = not got


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a member goes."""

    split: SplitName
    ref: ClassRef
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMember:
    """A member of a stretch; `start` is where in the buffer its bytes lie."""

    place: Place
    start: int
    size_bytes: int
    mtime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A run of members that are wanted, in memory.

    Attributes:
        id: what it is called, the same each time the archive is read.
        offset: where in the decompressed archive it begins.
        end: where it ends.
    """

    id: str
    offset: int
    end: int
    members: tuple[StreamMember, ...]
    buffer: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A part of the archive that is damaged, after which the others can still be read."""

    id: str
    split: SplitName
    message: str


Placing = Callable[[Entry], "Place | None"]
"""Say where an entry goes; None: it is not taken. Raises `ArchiveError` for one that is refused."""

Other = Callable[[Entry, Callable[[], bytes]], None]
"""Look at an entry that is not taken; its content may be read, and is shorter than stated where the stream ends."""

Wanted = Callable[[Place], bool]
"""Whether this image, or this inner tar, is to be written."""


class Cutter:
    """Cuts a stream into stretches.

    Attributes:
        notes: what is unusual about the archive; complete when it has been read.
    """

    def __init__(self, window: Window, name: str, wanted: Wanted, *, stretch_bytes: int = STRETCH_BYTES) -> None:
        self._stretch_bytes = stretch_bytes
        self._window = window
        self._name = name
        self._wanted = wanted
        self._taken: list[StreamMember] = []
        self._start = 0
        self.notes: list[str] = []

    def flat(self, placing: Placing, other: Other = lambda _entry, _read: None) -> Iterator[Stretch]:
        """Cut an archive whose members are images.

        Args:
            placing: says where a member goes.
            other: is called with each entry that is not taken.

        Raises:
            ArchiveError: it is damaged, cut off, or holds something that is refused.
        """
        seen = _Names()
        number = 0
        for entry in self._entries(0, _UNKNOWN_END, self._name):
            if entry is None or self._full(entry):
                yield from self._hand_over(f"{number:05d}", self._end if entry is None else entry.header_offset)
                number += 1
            if entry is None:
                continue
            place = placing(entry)
            if place is None:
                other(entry, functools.partial(self._window.read_at, entry.data_offset, entry.size_bytes))
                continue
            if not seen.add(f"{place.split}/{place.ref.folder}/{place.name}"):
                raise _twice(self._name, entry)
            self._take(entry, place)

    def nested(self, placing: Placing) -> Iterator[Stretch | Fault]:
        """Cut an archive whose members are inner tars; one that is damaged becomes a `Fault`.

        Args:
            placing: says to which class an inner tar belongs; the name is not looked at.

        Raises:
            ArchiveError: the outer tar is damaged, cut off, or holds something that is refused.
        """
        seen: set[str] = set()
        for entry in self._entries(0, _UNKNOWN_END, self._name):
            place = None if entry is None else placing(entry)
            if entry is None or place is None:
                continue
            if place.ref.wnid in seen:
                raise _twice(self._name, entry)
            seen.add(place.ref.wnid)
            fault = None
            if self._wanted(place):
                self._window.discard(entry.data_offset)
                try:
                    yield from self._inner(entry, place)
                except (StreamCutError, StreamReadError):
                    raise
                except ArchiveError as error:
                    fault = Fault(id=place.ref.wnid, split=place.split, message=str(error))
                    self._taken = []
            self._window.discard(entry.end)
            if self._window.base < entry.end:
                raise StreamCutError(
                    f"{self._name}: the stream ends too early: in inner tar {entry.path[:300]!r}, which begins at byte "
                    f"{entry.header_offset:,}"
                )
            if fault is not None:
                yield fault

    def _inner(self, outer: Entry, outer_place: Place) -> Iterator[Stretch]:
        name = f"{self._name} ({outer_place.ref.wnid})"
        seen: set[str] = set()
        members = Members(name)
        number = 0
        self._start = outer.data_offset
        for entry in self._entries(outer.data_offset, outer.end, name):
            if entry is None or self._full(entry):
                end = self._end if entry is None else entry.header_offset
                yield from self._hand_over(f"{outer_place.ref.wnid}-{number}", end)
                number += 1
            member = None if entry is None else members.take(entry)
            if entry is None or member is None:
                continue
            if member.name in seen:
                raise _twice(name, entry)
            seen.add(member.name)
            self._take(entry, replace(outer_place, name=member.name))
        if not seen:
            raise ArchiveError(f"{name}: contains no images: the download is damaged")
        self.notes += [f"{name}: {note}" for note in members.notes()]

    def _entries(self, offset: int, end: int, name: str) -> Iterator[Entry | None]:
        """Yield the entries of a tar and, before what follows the last one is read, None: let go of what was taken."""
        first = True
        while True:
            self._end = offset
            if self._window.read_at(offset, BLOCK) == bytes(BLOCK):
                yield None
            entry = read_entry(self._window.read_at, offset, end, name, first=first)
            if isinstance(entry, EndOfArchive):
                self.notes += [f"{name}: {entry.note}"] if entry.note else []
                return
            yield entry
            offset, first = entry.end, False

    def _full(self, entry: Entry) -> bool:
        return entry.end - self._start > self._stretch_bytes and entry.header_offset > self._start

    def _take(self, entry: Entry, place: Place) -> None:
        if self._wanted(place):
            if not self._window.kept:
                self._window.discard(entry.header_offset)
                self._window.kept = True
            start = self._window.load(entry)
            self._taken.append(
                StreamMember(place=place, start=start, size_bytes=entry.size_bytes, mtime_s=entry.mtime_s)
            )

    def _hand_over(self, name: str, end: int) -> Iterator[Stretch]:
        start, self._start = self._start, end
        if self._taken:
            taken, self._taken = tuple(self._taken), []
            yield Stretch(id=name, offset=start, end=end, members=taken, buffer=self._window.cut(end))


def _twice(name: str, entry: Entry) -> ArchiveError:
    return ArchiveError(
        f"{name}: member {entry.path[:300]!r} at byte {entry.header_offset:,} appears twice: the archive is damaged"
    )


class _Names:
    """Which names have been seen, in about 10 bytes each: by their 64-bit digests, sorted."""

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(_BUCKETS)]

    def add(self, name: str) -> bool:
        """Return whether a name is new."""
        digest = xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
        bucket = self._buckets[digest % _BUCKETS]
        at = bisect_left(bucket, digest)
        if at < len(bucket) and bucket[at] == digest:
            return False
        bucket.insert(at, digest)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """Payload of a shard that lies in memory: its members with their positions in `Shard.classes`.

    `count_kinds`: say how many members begin neither like a JPEG nor like a PNG file.
    """

    members: tuple[tuple[int, str, int, float, int], ...]
    buffer: Buffer
    count_kinds: bool = False


class InMemoryReader:
    """Reads a shard that was cut from a stream: `members` of its payload are position, name, size, time and start."""

    def __init__(self, shard: Shard, pace: ReadPace) -> None:
        assert isinstance(shard.payload, InMemory)
        self._payload = shard.payload
        self._piece_bytes = pace.window_bytes
        self._current = self._payload.buffer.view[:0]
        self._kinds = ImageKinds() if self._payload.count_kinds else None

    def __enter__(self) -> InMemoryReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._current.release()

    def names(self) -> Iterator[tuple[int, str]]:
        """Return all names: the stretch has been read as a whole."""
        return ((position, name) for position, name, _, _, _ in self._payload.members)

    def members(self) -> Iterator[ReaderEntry]:
        """Yield every member."""
        view = self._payload.buffer.view
        for position, name, size_bytes, mtime_s, start in self._payload.members:
            self._current = view[start : start + size_bytes]
            yield position, name, size_bytes, mtime_s

    def copy(self, fd: int, write: Write) -> int:
        """Write the bytes of the current member."""
        current = self._current
        if self._kinds is not None:
            self._kinds.add(bytes(current[:8]))
        if len(current) <= self._piece_bytes:
            write(fd, current)
        else:
            for start in range(0, len(current), self._piece_bytes):
                write(fd, current[start : start + self._piece_bytes])
        return xxhash.xxh3_64_intdigest(current)

    def finish(self) -> tuple[str, ...]:
        """Return what is unusual about the images; there is nothing to verify, as the bytes have been read before."""
        return () if self._kinds is None else self._kinds.notes()
