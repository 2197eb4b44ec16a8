"""One image on its way: its data area, and what is put into its file beside the shards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.imaging import copy_range, is_packed, members_file, packed_file, shard_key
from imagenet_unpack.model import SPLITS, Layout, Shard, SplitName, SplitPlan
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.imageplan import DataArea, identity_digest
from imagenet_unpack.sources.imagerecord import TAR_BLOCK_BYTES, ImageRecord, Method, Original
from imagenet_unpack.targets.imagefile import ImageState, reserve
from imagenet_unpack.targets.imagetree import Figures
from imagenet_unpack.targets.members import Members

_CHUNK_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Job:
    """One image on its way.

    Attributes:
        state: its state folder, claimed.
        method: how the archives get into it.
        plans: the splits that it holds.
        data: where the archives lie in it.
        identity: what it is made from.
        done: keys of the shards that are done.
        skipped: those of them that earlier runs had done.
        uncommitted: those of them that the journal does not know yet.
        arrived: keys of the packed shards whose bytes wait, in a file each, for those before them.
        at: where in the image the bytes of the next packed shard, or of a stream, go.
    """

    state: ImageState
    method: Method
    plans: tuple[SplitPlan, ...]
    data: DataArea
    identity: dict[str, Any]
    done: set[str] = field(default_factory=set)
    skipped: frozenset[str] = frozenset()
    uncommitted: list[str] = field(default_factory=list)
    arrived: set[str] = field(default_factory=set)
    at: int = 0
    _waiting: deque[Shard] = field(default_factory=deque)
    _shifts: dict[str, int] = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether the archive itself becomes the image."""
        return self.method == "in-place"

    @property
    def todo(self) -> list[Shard]:
        """The shards that are not done; packed ones in the order in which they lie in the image."""
        plain = [shard for plan in self.plans for shard in plan.shards if not is_packed(shard)]
        return [shard for shard in (*plain, *self.packed) if shard_key(shard) not in self.done]

    @property
    def packed(self) -> list[Shard]:
        """The shards whose members do not lie in their source as they are, in the order in which they are placed."""
        packed = [shard for plan in self.plans for shard in plan.shards if is_packed(shard)]
        return sorted(packed, key=lambda shard: (SPLITS.index(shard.split), shard.archive.path, shard.offset, shard.id))

    @property
    def streams(self) -> bool:
        """Whether anything is read from streams."""
        return any(plan.stream is not None for plan in self.plans)

    def unreserved_bytes(self, workers: int) -> int:
        """Return how much room packed shards and streams still need, about, with so many workers."""
        total = sum(plan.content_bytes for plan in self.plans if plan.stream is not None)
        for plan in self.plans:
            packed = [shard for shard in plan.shards if is_packed(shard)]
            left = [shard.size_bytes for shard in packed if shard_key(shard) not in self.done]
            if left:
                needed = plan.content_bytes * sum(left) // max(1, sum(shard.size_bytes for shard in packed))
                total += needed + min(needed, workers * max(left))
        return total

    def continue_packed(self) -> None:
        """Find out where the next packed shard goes: they are journaled in the order in which they lie in the image."""
        self.at = self.data.end
        self._waiting = deque(self.packed)
        while self._waiting and shard_key(self._waiting[0]) in self.done:
            shard = self._waiting.popleft()
            self._place(shard, sum(Members.read(members_file(self.state.folder, shard)).sizes))
        self.done -= {shard_key(shard) for shard in self._waiting}

    def fill(self) -> None:
        """Make the image file as large as its data area."""
        fresh = not self.done
        fd = os.open(self.state.image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if fresh:
                os.ftruncate(fd, 0)
            if fresh and self.method == "copy":
                reserve(fd, self.data.end)
            os.ftruncate(fd, max(self.data.end, self.at))
        finally:
            os.close(fd)

    def copy_gaps(self, file: BinaryIO, cancel: Cancel) -> None:
        """Copy what belongs to no shard."""
        for piece in self.data.gaps(self.plans):
            cancel.check()
            copy_range(piece.archive, file.fileno(), piece.offset, piece.end, piece.shift)

    def append_packed(self, image_fd: int) -> None:
        """Put the bytes of the packed shards whose turn has come into the image."""
        while self._waiting and shard_key(self._waiting[0]) in self.arrived:
            shard = self._waiting.popleft()
            path = packed_file(self.state.folder, shard)
            with open(path, "rb", buffering=0) as source:
                size_bytes = os.fstat(source.fileno()).st_size
                _append(source.fileno(), image_fd, self.at)
            self._place(shard, size_bytes)
            path.unlink()
            key = shard_key(shard)
            self.arrived.remove(key)
            self.done.add(key)
            self.uncommitted.append(key)

    def extend(self, shifts: dict[str, int], end: int) -> None:
        """Enter what was written behind the packed shards, up to `end`."""
        self._shifts |= shifts
        self.at = end

    def close_data(self) -> None:
        """End the data area behind what was packed: the tables follow."""
        self.data = self.data.extended(self._shifts, self.at)

    def _place(self, shard: Shard, size_bytes: int) -> None:
        self._shifts[shard_key(shard)] = self.at
        self.at += size_bytes

    def record(
        self, layouts: Sequence[Layout], figures_of: dict[SplitName, Figures], superblock: bytes, end: int, digest: str
    ) -> ImageRecord:
        """Return the record of the image; an archive that changed since it was planned is an `ArchiveError`."""
        original = None
        if self.in_place:
            archive = self.plans[0].archive
            with open(archive.path, "rb") as file:
                first_block = file.read(TAR_BLOCK_BYTES)
                status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (archive.size_bytes, archive.mtime_ns):
                raise ArchiveError(f"{archive.path}: it changed during the run: run the same command again")
            original = Original(size_bytes=archive.size_bytes, mtime_ns=archive.mtime_ns, first_block=first_block)
        return ImageRecord(
            method=self.method,
            identity=identity_digest(self.identity),
            layouts=tuple(layouts),
            splits={
                split: (figures.classes, figures.images, figures.size_bytes) for split, figures in figures_of.items()
            },
            official=tuple(plan.split for plan in self.plans if plan.archive.official),
            superblock=superblock,
            start=self.data.end,
            end=end,
            digest=digest,
            archives=self.data.held(self.plans),
            original=original,
        )


def _append(source_fd: int, target_fd: int, at: int) -> None:
    """Copy a file into another one; where extents can be shared, no byte is copied."""
    offset = 0
    with suppress(OSError):  # a file system that cannot
        while copied := os.copy_file_range(source_fd, target_fd, _CHUNK_BYTES, offset, at + offset):
            offset += copied
    while data := os.pread(source_fd, _PIECE_BYTES, offset):
        view = memoryview(data)
        while view:
            written = os.pwrite(target_fd, view, at + offset)
            view, offset = view[written:], offset + written
