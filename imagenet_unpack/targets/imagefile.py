"""The file of an unfinished image: its state beside it, the steps that finish it, and undoing an image made in place.

    .<name>.imagenet_unpack/     beside the file, until it is whole
        record.json              says that the folder is this program's
        lock                     held by the run
        plan.json                what the image is made from
        image                    the file itself (reflink, copy), or its tables (in-place)
        journal                  shards known to be on the disk
        <shard>.members          what a shard holds
        original.json            what restores the archive (in-place)

An archive that is converted in place is, at every moment, the whole archive or the whole image:

    archive --append tables, sync--> archive and bytes behind its end --write 512 bytes, sync--> image
    image   --write 512 bytes, sync--> archive and bytes behind its end --truncate, sync--> archive

Before the first arrow of either line, `original.json` is on the disk. Whatever step a crash comes after, `restore` and
`convert` find the way from there by the first bytes of the file and by that record.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from imagenet_unpack.errors import TargetError
from imagenet_unpack.sources.imagerecord import TAR_BLOCK_BYTES, Original, state_folder
from imagenet_unpack.targets.durable import Disk, read_file

_CHECKSUM = slice(148, 156)
_COPY_BYTES = 1 << 20
_PROGRAM = {"program": "imagenet_unpack", "schema": 1}


class ImageState:
    """The state folder of the image `output`, with every write of it made durable by `disk`."""

    def __init__(self, output: Path, disk: Disk) -> None:
        self.output = output
        self.disk = disk
        self.folder = state_folder(output)
        self.image = self.folder / "image"
        self.lock = self.folder / "lock"
        self._record = self.folder / "record.json"
        self._plan = self.folder / "plan.json"
        self._journal = self.folder / "journal"
        self._original = self.folder / "original.json"

    def claim(self) -> None:
        """Make the folder, or recognise it as this program's.

        Raises:
            TargetError: it cannot be made, or is something else's.
        """
        try:
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise TargetError(f"{self.folder} is in the way: it is not a folder of this program; move it away")
            if self.folder.exists() and not self.exists():
                raise TargetError(f"{self.folder} is not a folder of this program: move it away")
            if _read_json(self._record) is None:
                self.disk.make_folder(self.folder)
                self.disk.write_file(self._record, json.dumps(_PROGRAM).encode())
                self.disk.sync_folder(self.folder.parent)
        except OSError as error:
            raise TargetError(f"{self.folder}: cannot be used: {error.strerror}") from error

    def exists(self) -> bool:
        """Say whether the folder is there and this program's, also if a crash came before its record was written."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return False
        value = _read_json(self._record)
        if value is not None:
            return value.get("program") == _PROGRAM["program"]
        return all(entry.name.startswith((self.lock.name, self._record.name)) for entry in self.folder.iterdir())

    def begin(self, identity: dict[str, Any]) -> bool:
        """Continue what was begun from the same archives and options, or begin; return whether it continues.

        Raises:
            TargetError: an unfinished image was begun from something else.
        """
        before = _read_json(self._plan)
        if before == identity:
            return True
        if before is not None and self.done():
            raise TargetError(
                f"{self.output}: an unfinished image was begun from other archives or with other options: give the "
                "same again to continue, or use --restart"
            )
        self.clear_work()
        self.disk.write_file(self._plan, json.dumps(identity).encode())
        return False

    def clear_work(self) -> None:
        """Remove what an unfinished run has made; what restores an archive stays."""
        for entry in list(self.folder.iterdir()):
            if entry not in (self._record, self.lock, self._original):
                self.disk.remove(entry)
        self.disk.sync_folder(self.folder)

    def done(self) -> set[str]:
        """Return the keys of the shards that are known to be on the disk."""
        return set((read_file(self._journal) or b"").decode("utf-8", "replace").split("\n")) - {""}

    def commit(self, keys: Iterable[str]) -> None:
        """Journal shards, after everything written so far has been brought to the disk."""
        self.disk.sync_all(self.folder)
        # A line torn by a crash is closed first, so that it cannot swallow the next one.
        self.disk.append(self._journal, "".join(f"\n{key}" for key in (*keys, "")).encode())

    def publish(self) -> None:
        """Give the synced image its name, and remove the state folder."""
        self.disk.sync_file(self.image)
        self.disk.rename(self.image, self.output)
        self.disk.sync_folder(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the state folder."""
        self.disk.remove_tree(self.folder)
        with suppress(OSError):
            self.disk.sync_folder(self.output.parent)

    def keep_original(self, original: Original) -> None:
        """Bring to the disk what restores the archive."""
        self.disk.write_file(self._original, json.dumps(original.to_json()).encode())
        self.disk.sync_folder(self.folder.parent)

    def forget_original(self) -> None:
        """Remove it: the archive is whole and needs it no longer, or the image holds it."""
        self.disk.remove(self._original)
        self.disk.sync_folder(self.folder)


def reserve(fd: int, size_bytes: int) -> None:
    """Reserve room for a file, so that it does not run out half way; where the file system cannot, do nothing.

    Raises:
        OSError: there is no room, or a quota says so.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # os.posix_fallocate writes to every block where this is not supported
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, 0, 0, size_bytes) != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def head_of(superblock: bytes, first_block: bytes) -> bytes:
    """Return the first 512 bytes of an image made in place: the superblock in the name of the first tar header.

    The header's checksum is recomputed, so that the file stays a valid tar, whose first member has an odd name.
    """
    block = bytearray(first_block)
    block[: len(superblock)] = superblock
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def convert(archive: Path, state: ImageState, original: Original, start: int, superblock: bytes) -> None:
    """Turn an archive into an image: append the tables in `state.image`, then write the first 512 bytes.

    Args:
        archive: the archive, as it was when `original` was taken.
        state: its state folder, in which `original` is kept already.
        original: what restores it.
        start: where the tables go.
        superblock: what makes it an image.

    Raises:
        OSError: the file system refuses; the file is the whole archive, with bytes behind its end.
    """
    disk = state.disk
    with _opened_for_writing(archive) as fd, open(state.image, "rb") as tables:
        disk.step("append", archive)
        offset = start
        while data := tables.read(_COPY_BYTES):
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written
        _sync(fd, archive, disk)
        disk.step("write superblock", archive)
        os.pwrite(fd, head_of(superblock, original.first_block), 0)
        _sync(fd, archive, disk)
    state.remove()


def bring_back(archive: Path, state: ImageState, original: Original) -> None:
    """Turn an image that was made in place, or what a crash left of the conversion, back into the archive.

    Args:
        archive: the file.
        state: its state folder, claimed.
        original: what it was before.

    Raises:
        OSError: the file system refuses; the same call works again.
    """
    disk = state.disk
    state.keep_original(original)
    with _opened_for_writing(archive) as fd:
        if os.pread(fd, TAR_BLOCK_BYTES, 0) != original.first_block:
            disk.step("write header", archive)
            os.pwrite(fd, original.first_block, 0)
            _sync(fd, archive, disk)
        if os.fstat(fd).st_size != original.size_bytes:
            disk.step("truncate", archive)
            os.ftruncate(fd, original.size_bytes)
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, original.mtime_ns))
        _sync(fd, archive, disk)
    state.forget_original()


@contextmanager
def _opened_for_writing(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync(fd: int, path: Path, disk: Disk) -> None:
    disk.step("sync", path)
    os.fsync(fd)
    disk.synced(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(read_file(path) or b"null")
    except ValueError as error:
        raise TargetError(f"{path}: is damaged: remove {path.parent} to begin again") from error
    return value if isinstance(value, dict) else None
