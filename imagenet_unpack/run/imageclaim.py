"""Who may work on an image or an archive: state folders, locks, what may be changed in place; and the way back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, TargetError, UnpackError, reason
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.imagerecord import is_image, read_original, read_record
from imagenet_unpack.sources.tarindex import Entry, read_entry
from imagenet_unpack.targets import archivelock
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.imagefile import ImageState, bring_back
from imagenet_unpack.targets.locks import InUseError, LockFile


@contextmanager
def named_errors(path: Path, kind: type[UnpackError]) -> Iterator[None]:
    """Turn errors of files that the run itself meets into known ones that name the file, or else `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise kind(f"{where}: {reason(error)}: fix this, then run the same command again") from error


def remove_leftovers(state: ImageState) -> None:
    """Remove what a crash left of the state of an image that is whole."""
    if state.exists():
        with claimed(state):
            state.remove()


def claimed(state: ImageState) -> ExitStack:
    """Claim a state folder and hold its lock until the end of the block."""
    state.claim()
    with ExitStack() as stack:
        lock = stack.enter_context(LockFile(state.lock, str(state.output)))
        if not lock.attempt():
            raise InUseError(f"{state.output} is being made or restored by {lock.holder()}: wait for it or stop it")
        lock.sign()
        return stack.pop_all()


def exclusive(path: Path) -> ExitStack:
    """Hold the only lock on an archive that is to be changed, having looked whether that may be done.

    Raises:
        TargetError: it may not.
    """
    status = path.lstat()
    if path.is_symlink():
        raise TargetError(f"{path}: is a symbolic link: give the archive itself")
    if status.st_nlink > 1:
        raise TargetError(
            f"{path}: has {status.st_nlink} hard links, and all of them would change: use reflink or copy"
        )
    if not os.access(path, os.W_OK) or not status.st_mode & 0o222:
        raise TargetError(f"{path}: is read-only: make it writable, or use --method reflink or copy")
    with ExitStack() as stack, named_errors(path, TargetError):
        stack.enter_context(archivelock.exclusive(path))
        return stack.pop_all()


def restore(path: Path, disk: Disk) -> bool:
    """Turn an image that was made in place, or what a crash left of its making, back into the archive.

    Returns:
        whether there was anything to do: an archive is left as it is, as a crash may have come before the first change.

    Raises:
        TargetError: it is not such an image, is in use, or cannot be written.
    """
    state = ImageState(path, disk)
    with named_errors(path, TargetError), archivelock.exclusive(path):
        original = read_original(path)
        if is_image(path) and original is None:
            record = read_record(path)
            original = record.original if record is not None else None
            if original is None:
                raise TargetError(
                    f"{path}: was not made in place, so no archive was changed: there is nothing to restore"
                )
        if original is None and not state.exists():
            if not _is_tar(path):
                raise TargetError(f"{path}: is neither an image that was made in place nor an archive")
            return False
        with claimed(state):
            if original is not None:
                bring_back(path, state, original)
            state.remove()
    return True


def _is_tar(path: Path) -> bool:
    with opened(path) as (stat, read_at):
        try:
            return isinstance(read_entry(read_at, 0, stat.st_size, str(path), first=True), Entry)
        except ArchiveError:
            return False
