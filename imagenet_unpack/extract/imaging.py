"""One shard of an image that is copied: where its members lie, its bytes and their digests.

The whole byte range is read in windows, each window is written to its place in the image as it is, and the digest of
each member is taken on the way. Sources that are no plain tars are packed: the bytes of their members are written one
after another to a file of the shard's own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.extractor import open_reader
from imagenet_unpack.extract.sink import Pace
from imagenet_unpack.extract.worker import Settings, ShardPace, guarded
from imagenet_unpack.model import ArchiveId, Outcome, Shard, ShardDone
from imagenet_unpack.sources.imagerecord import original_of
from imagenet_unpack.sources.reader import SourceError
from imagenet_unpack.sources.tar import TarReader
from imagenet_unpack.sources.windows import NO_FLAG, RWF_DONTCACHE, WindowedFile
from imagenet_unpack.targets.members import MAX_MTIME_S, Located, Members

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """What every shard of an image shares.

    Attributes:
        run: what it shares with every other kind of run.
        folder: holds a file of members for each shard that is done.
        copy_to: the image that the shards' bytes are copied to; "": they are only located.
        shifts: for each shard, by `shard_key`, what to add to an offset in its archive to get the one in the image.
    """

    run: Settings
    folder: str
    copy_to: str
    shifts: dict[str, int]


def shard_key(shard: Shard) -> str:
    """Return a name for a shard that is unique in an image and safe as a file name."""
    return f"{shard.split}.{shard.id}"


def members_file(folder: Path, shard: Shard) -> Path:
    """Return where the members of a shard are kept."""
    return folder / f"{shard_key(shard)}.members"


def packed_file(folder: Path, shard: Shard) -> Path:
    """Return where the bytes of a shard's members are kept until they are put into the image."""
    return folder / f"{shard_key(shard)}.data"


def is_packed(shard: Shard) -> bool:
    """Say whether a shard's members do not lie in its source as they are."""
    return shard.format != "tar"


def image_shard(shard: Shard, settings: ImageSettings) -> Outcome:
    """Copy or pack the members of one shard, and write its file of members; never raises."""
    folder = Path(settings.folder)

    def task(stack: ExitStack) -> ShardDone:
        pace = ShardPace(shard, settings.run, folder, stack)
        pace.window(0)
        members_file(folder, shard).unlink(missing_ok=True)  # an earlier run's must not stand for this one's
        if is_packed(shard):
            return _done(shard, folder, *pack_members(shard, pace, packed_file(folder, shard)))
        file = _CopyingFile(shard, pace, settings.copy_to, settings.shifts[shard_key(shard)])
        stack.callback(file.close_image)
        return _done(shard, folder, *copy_members(shard, pace, file))

    return guarded(shard, settings.run, folder, task)


def _done(shard: Shard, folder: Path, members: Members, notes: tuple[str, ...]) -> ShardDone:
    members.write(members_file(folder, shard))
    return ShardDone(shard=shard.id, split=shard.split, images=len(members), size_bytes=sum(members.sizes), notes=notes)


def recover(shard: Shard, folder: Path) -> ShardDone | None:
    """Return what the file of members says of its shard, or None where there is none."""
    try:
        members = Members.read(members_file(folder, shard))
    except FileNotFoundError:
        return None
    return ShardDone(shard=shard.id, split=shard.split, images=len(members), size_bytes=sum(members.sizes))


def located(shard: Shard, folder: Path, rows: Iterable[Located], notes: tuple[str, ...]) -> ShardDone:
    """Write the file of members of a shard whose members were located, and return its outcome.

    Raises:
        ArchiveError: a name occurs twice in a class.
    """
    members = sorted_members(shard, rows, digests=False)
    return _done(shard, folder, members, _notes(shard, members, notes))


def copy_members(shard: Shard, pace: Pace, file: _CopyingFile) -> tuple[Members, tuple[str, ...]]:
    """Copy the byte range of a shard of a tar; return its members, and notes on the archive.

    Raises:
        ArchiveError: the archive is at fault.
        OSError: the image cannot be written.
    """
    with TarReader(shard, pace, file) as reader:
        members = sorted_members(shard, _copied(reader), digests=True)
        file.copy_rest()
        notes = reader.finish()
    return members, _notes(shard, members, notes)


def pack_members(shard: Shard, pace: Pace, path: Path) -> tuple[Members, tuple[str, ...]]:
    """Write the bytes of all members to a file, one after another; return them, with offsets in it, and notes.

    Raises:
        ArchiveError: the source is at fault.
        OSError: the file cannot be written.
    """
    rows: list[Located] = []
    offset = 0

    def write(fd: int, view: memoryview) -> None:
        pace.write(len(view))
        while view:
            view = view[os.write(fd, view) :]

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open_reader(shard, pace) as reader:
            for position, name, size_bytes, mtime_s in reader.members():
                digest = reader.copy(fd, write)
                rows.append((position, name.encode(), offset, size_bytes, located_time(mtime_s), digest))
                offset += size_bytes
            notes = reader.finish()
    finally:
        os.close(fd)
    members = sorted_members(shard, rows, digests=True)
    return members, _notes(shard, members, notes)


def sorted_members(shard: Shard, rows: Iterable[Located], *, digests: bool) -> Members:
    """Return members sorted by class and name.

    Raises:
        ArchiveError: a name occurs twice in a class.
    """
    try:
        return Members.from_rows(rows, digests=digests)
    except ValueError as error:
        raise ArchiveError(
            f"{shard.archive.path} ({shard.id}): member {str(error)!r} appears twice: the archive is damaged"
        ) from None


def located_time(mtime_s: float) -> int:
    """Return a modification time as an image can hold it."""
    return min(max(int(mtime_s), 0), MAX_MTIME_S)


def _copied(reader: TarReader) -> Iterator[Located]:
    for position, name, size_bytes, mtime_s in reader.members():
        digest = reader.copy(-1, _write_nothing)
        yield position, name.encode(), reader.data_offset, size_bytes, located_time(mtime_s), digest


def _write_nothing(_fd: int, _view: memoryview) -> None:
    """The window that holds the member has been written already."""


def _notes(shard: Shard, members: Members, notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{shard.id}: {note}" for note in (*notes, _odd_names(shard, members)) if note)


def _odd_names(shard: Shard, members: Members) -> str:
    """Say which members do not look like images of their class, or nothing."""
    prefix = f"{shard.classes[0].wnid}_".encode() if shard.split == "train" and len(shard.classes) == 1 else b""
    odd = [name for name in members.names if not (name.endswith(b".JPEG") and name.startswith(prefix))]
    if not odd:
        return ""
    return f"{len(odd)} members do not look like images of their class, such as {odd[0].decode()!r}: taken as they are"


class _CopyingFile(WindowedFile):
    """An archive whose windows are written to an image as they are read, without a gap from the shard's begin on."""

    def __init__(self, shard: Shard, pace: Pace, image: str, shift: int) -> None:
        super().__init__(shard.archive, pace)
        self._writing_pace = pace
        self._shift = shift
        self._end = shard.end
        self._copied = shard.offset
        self._image_fd = os.open(image, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._write_flags = RWF_DONTCACHE

    def close_image(self) -> None:
        """Close the image."""
        os.close(self._image_fd)

    def copy_rest(self) -> None:
        """Copy what no member needed: the end of the tar, and members that were left out."""
        self._copy_gap(self._end)

    def _load(self, offset: int, end: int) -> None:
        self._copy_gap(offset)
        super()._load(offset, end)
        self._write_at(self._view[: self._stop - self._start], self._start)
        self._copied = self._stop

    def _copy_gap(self, end: int) -> None:
        while self._copied < end:
            size = min(_PIECE_BYTES, end - self._copied)
            self._pace.window(size)
            data = self.read_at(self._copied, size)
            if not data:
                raise SourceError(f"{self._archive.path}: it ends at byte {self._copied}: cut off during the run")
            self._write_at(memoryview(data), self._copied)
            self._copied += len(data)

    def _write_at(self, view: memoryview, offset: int) -> None:
        self._writing_pace.write(len(view))
        offset += self._shift
        begin, size = offset, len(view)
        while view:
            try:
                written = os.pwritev(self._image_fd, [view], offset, self._write_flags)
            except OSError as error:
                if not self._write_flags or error.errno not in NO_FLAG:
                    raise
                self._write_flags = 0
                continue
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view, offset = view[written:], offset + written
        if not self._write_flags:  # begin to write it to the disk now, not all at the end
            os.posix_fadvise(self._image_fd, begin, size, os.POSIX_FADV_DONTNEED)


def copy_range(archive: ArchiveId, image_fd: int, offset: int, end: int, shift: int) -> None:
    """Copy bytes of an archive that belong to no shard (headers of the outer tar, its end) to their place in an image.

    Raises:
        SourceError: the archive cannot be read.
        OSError: the image cannot be written.
    """
    try:
        source_fd = os.open(archive.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{archive.path}: cannot be opened: {error.strerror}") from error
    try:
        original = original_of(source_fd, Path(archive.path))
        while offset < end:
            try:
                data = os.pread(source_fd, min(_PIECE_BYTES, end - offset), offset)
            except OSError as error:
                raise SourceError(f"{archive.path}: cannot be read at byte {offset}: {error.strerror}") from error
            if not data:
                raise SourceError(f"{archive.path}: it ends at byte {offset}: cut off during the run")
            view = memoryview(data if original is None else original.restore(data, offset))
            while view:
                written = os.pwrite(image_fd, view, offset + shift)
                view, offset = view[written:], offset + written
    finally:
        os.close(source_fd)
