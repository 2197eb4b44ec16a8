"""One image on its way: its data area, and what is put into its file beside the shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.imaging import copy_range, is_packed, packed_file, shard_key
from imagenet_unpack.model import Layout, Shard, SplitName, SplitPlan
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.imageplan import DataArea, identity_digest
from imagenet_unpack.sources.imagerecord import TAR_BLOCK_BYTES, ImageRecord, Method, Original
from imagenet_unpack.targets.imagefile import ImageState, reserve
from imagenet_unpack.targets.imagetree import Figures

_CHUNK_BYTES = 64 << 20


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
    """

    state: ImageState
    method: Method
    plans: tuple[SplitPlan, ...]
    data: DataArea
    identity: dict[str, Any]
    done: set[str] = field(default_factory=set)
    skipped: frozenset[str] = frozenset()
    uncommitted: list[str] = field(default_factory=list)

    @property
    def in_place(self) -> bool:
        """Whether the archive itself becomes the image."""
        return self.method == "in-place"

    @property
    def todo(self) -> list[Shard]:
        """The shards that are not done."""
        return [shard for plan in self.plans for shard in plan.shards if shard_key(shard) not in self.done]

    @property
    def packed(self) -> list[Shard]:
        """The shards whose members do not lie in their source as they are."""
        return [shard for plan in self.plans for shard in plan.shards if is_packed(shard)]

    def fill(self) -> None:
        """Make the image file as large as its data area."""
        fresh = not self.done
        fd = os.open(self.state.image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if fresh:
                os.ftruncate(fd, 0)
            if fresh and self.method == "copy":
                reserve(fd, self.data.end)
            os.ftruncate(fd, self.data.end)
        finally:
            os.close(fd)

    def copy_gaps(self, file: BinaryIO, cancel: Cancel) -> None:
        """Copy what belongs to no shard."""
        for piece in self.data.gaps(self.plans):
            cancel.check()
            copy_range(piece.archive, file.fileno(), piece.offset, piece.end, piece.shift)

    def append_packed(self, file: BinaryIO, cancel: Cancel) -> None:
        """Put the bytes that were packed into the image; where extents can be shared, no byte is copied."""
        shards = self.packed
        paths = [packed_file(self.state.folder, shard) for shard in shards]
        at = self.data.end
        self.data = self.data.with_packed(
            (shard, path.stat().st_size) for shard, path in zip(shards, paths, strict=True)
        )
        for path in paths:
            with open(path, "rb", buffering=0) as source:
                while True:
                    cancel.check()
                    copied = os.copy_file_range(source.fileno(), file.fileno(), _CHUNK_BYTES, offset_dst=at)
                    if not copied:
                        break
                    at += copied

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
