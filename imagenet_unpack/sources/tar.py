"""The reader of uncompressed tars: a whole inner tar (train), or a run of members (val)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import Shard
from imagenet_unpack.sources import magic
from imagenet_unpack.sources.members import Members
from imagenet_unpack.sources.reader import Entry, ReadPace, SourceError, Write
from imagenet_unpack.sources.tarindex import BLOCK, EndOfArchive, plain_header, read_entry
from imagenet_unpack.sources.windows import WindowedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTar:
    """Payload of a shard that is a tar of its own, with the images of one class; it must end as a tar ends.

    Attributes:
        images: how many members it should have, where that is published.
        demand_images: fail where it has another number; else only note it.
        count_kinds: say how many members begin neither like a JPEG nor like a PNG file.
    """

    images: int | None = None
    demand_images: bool = True
    count_kinds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TarRun:
    """Payload of a shard that is a run of members of a tar.

    Attributes:
        labels: member name to position in `Shard.classes`, for the members that are wanted; None: all, of the first.
    """

    labels: dict[str, int] | None = None


class TarReader:
    """Reads a shard of a tar; `data_offset` says where in the archive the bytes of the current member lie.

    Args:
        shard: what to read.
        pace: is asked before each window.
        file: reads the archive, where that is not to be done in windows.
    """

    data_offset = 0

    def __init__(self, shard: Shard, pace: ReadPace, file: WindowedFile | None = None) -> None:
        payload = WholeTar() if shard.payload is None else shard.payload
        assert isinstance(payload, (WholeTar, TarRun))
        self._shard = shard
        self._whole = payload if isinstance(payload, WholeTar) else None
        self._labels = payload.labels if isinstance(payload, TarRun) else None
        self._kinds = magic.ImageKinds() if self._whole is not None and self._whole.count_kinds else None
        self._file = file or WindowedFile(shard.archive, pace)
        self._size_bytes = 0
        self._end = shard.end
        self._notes: list[str] = []

    def __enter__(self) -> TarReader:
        self._file.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def names(self) -> Iterable[tuple[int, str]] | None:
        """Return the names that the plan found in a run of members."""
        if self._labels is None:
            return None
        return ((position, name) for name, position in self._labels.items())

    def members(self) -> Iterator[Entry]:
        """Yield the members that are wanted."""
        shard, file, labels = self._shard, self._file, self._labels
        whole = self._whole is not None
        archive = f"{shard.archive.path} ({shard.id})" if whole else shard.archive.path
        offset, end = shard.offset, shard.end
        members = Members(archive)
        notes: list[str] = []
        folder = ""
        count = 0
        while whole or offset < end:
            plain = plain_header(file.block(offset, BLOCK, end), folder) if offset + BLOCK <= end else None
            if plain is not None and offset + BLOCK + plain[1] <= end:
                name, size, mtime = plain
                data, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
            else:
                entry = read_entry(file, offset, end, archive, first=whole and offset == shard.offset)
                if isinstance(entry, EndOfArchive):
                    notes.extend([entry.note] if entry.note else [])
                    break
                offset = entry.end
                if count and members.folder is None:
                    members.folder = ""  # what the fast path took had bare names
                member = members.take(entry)
                if member is None:
                    continue
                folder = member.folder
                name, size, mtime = member.name, member.size_bytes, member.mtime_s  # type: ignore[assignment]
                data = member.data_offset
            position = 0 if labels is None else labels.get(name)
            if position is None:  # of a class that was not asked for
                continue
            count += 1
            self.data_offset, self._size_bytes = data, size
            yield position, name, size, mtime
        if self._whole is not None:
            self._notes = [*notes, *members.notes()]
            if not count:
                raise ArchiveError(f"{archive}: contains no images: the download is damaged")
            if self._whole.images not in (None, count):
                why = f"holds {count:,} images, but the official archive has {self._whole.images:,} of this class"
                if self._whole.demand_images:
                    raise ArchiveError(
                        f"{archive}: {why}: the download is incomplete or damaged: download it again, or use "
                        "--verify-archives none to take what is there"
                    )
                self._notes.append(f"{why}: taken as it is because of --verify-archives none")
        if labels is not None and count != len(labels):
            raise SourceError(f"{archive}: it changed since it was planned: run the same command again")

    def copy(self, fd: int, write: Write) -> int:
        """Write the bytes of the current member."""
        if self._kinds is not None:
            self._kinds.add(self._file.read_at(self.data_offset, min(self._size_bytes, 8)))
        return self._file.copy(self.data_offset, self._size_bytes, self._end, fd, write)

    def finish(self) -> tuple[str, ...]:
        """Verify that the archive has not changed, and return what is unusual about its end."""
        self._file.verify_unchanged()
        return (*self._notes, *(self._kinds.notes() if self._kinds is not None else ()))
