"""Durable writes: every change of a target's state goes through one `Disk`.

A name that is on the disk has its contents on the disk: files are written under a temporary name, synced, renamed, and
then the folder is synced. Nothing is opened through a symbolic link.

What "on the disk" takes depends on the file system. `syncfs` covers everything written so far on the disk file systems,
on NFS (it commits what it wrote) and on overlayfs (it syncs the upper layer). A FUSE file system gets it only as a
flush of the kernel's own cache (fs/fuse/inode.c: only virtiofs passes it on), and 9p, SMB, eCryptfs, VirtualBox folders
and Coda have no `sync_fs` operation at all: there each file has to be synced by itself.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

SyncMode = Literal["auto", "files", "fs"]
SYNC_MODES: tuple[SyncMode, ...] = ("auto", "files", "fs")

# include/uapi/linux/magic.h; SMB's numbers: fs/smb/client/cifs_fs_sb.h and cifsfs.c.
FUSE_MAGIC = 0x65735546
_SYNC_EACH_FILE = {FUSE_MAGIC, 0x01021997, 0xFF534D42, 0xFE534D42, 0x517B, 0xF15F, 0x786F4256, 0x73757245}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # the target itself may be a link
log = logging.getLogger(__name__)


def file_system_magic(path: Path) -> int:
    """Return the type of the file system that holds `path`, as statfs(2) numbers it; 0 where it is unknown."""
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(512)  # larger than struct statfs on every architecture
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF  # its first field, a long: the magic has 32 bits


def needs_sync_of_each_file(path: Path) -> bool:
    """Say whether `syncfs` on the file system that holds `path` is known to bring nothing to the disk."""
    return file_system_magic(path) in _SYNC_EACH_FILE


class Disk:
    """Writes below one target, in an order that a crash cannot undo.

    Attributes:
        tried: whether its file system was tried (`claim.try_file_system`).

    Args:
        sync_each_file: files are brought to the disk one by one (by whoever writes them), not by `syncfs`.
        durable: False: only whole state files (`write_file`) are synced; images and journal survive the process, but
            not the machine.
    """

    def __init__(self, *, sync_each_file: bool = False, durable: bool = True) -> None:
        self.sync_each_file = sync_each_file and durable
        self.durable = durable
        self.tried = False
        self._warned = False

    @classmethod
    def for_folder(cls, folder: Path, *, mode: SyncMode = "auto", durable: bool = True) -> Disk:
        """Choose how to sync by the file system that holds `folder`, or as `mode` says."""
        each = needs_sync_of_each_file(folder) if mode == "auto" else mode == "files"
        return cls(sync_each_file=each, durable=durable)

    def step(self, operation: str, path: Path) -> None:
        """Do nothing; called before each operation, so that a test can stop there."""

    def synced(self, path: Path, *, everything: bool = False) -> None:
        """Do nothing; called when `path`, or everything, is known to be on the disk, for tests."""

    def write_file(self, path: Path, data: bytes, *, sync: bool = True) -> None:
        """Write a file atomically: it is whole (and on the disk, with `sync`) under its name, or not there."""
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            self.step("create", partial)
            with _opened(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                _write_all(fd, data)
                if sync:
                    self._sync_fd(fd, partial)
            self.rename(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        if sync:
            self._sync_folder(path.parent)

    def append(self, path: Path, data: bytes) -> None:
        """Append to a file, which is made where it is missing, and bring it to the disk."""
        new = not path.exists()
        self.step("append", path)
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
            _write_all(fd, data)
            if self.durable:
                self._sync_fd(fd, path)
        if new:
            self.sync_folder(path.parent)

    def make_folder(self, path: Path) -> None:
        """Make a folder with its parents; an existing one is not an error."""
        self.step("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, source: Path, destination: Path) -> None:
        """Rename a file or a folder; the caller syncs the folders."""
        self.step("rename", source)
        os.rename(source, destination)

    def move_folder(self, source: Path, destination: Path) -> None:
        """Rename a folder, also where it lies on a lower layer of an overlay, which answers EXDEV.

        There the folders are made again beside it and its files renamed into them one by one; that copies them to the
        upper layer, so they are synced before the last rename.
        """
        try:
            # A copy without its source: a crash came just before the last rename.
            self.rename(source if os.path.lexists(source) else copy_of(source), destination)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy = copy_of(source)
            self.merge_folder(source, copy)
            self.sync_all(copy)
            self.rename(copy, destination)

    def merge_folder(self, source: Path, destination: Path) -> None:
        """Move all that a folder holds into another one, file by file where both have a folder of one name."""
        self.make_folder(destination)
        for entry in sorted(source.iterdir()):
            into = destination / entry.name
            if not (_is_folder(entry) and _is_folder(into)):
                try:
                    self.rename(entry, into)
                    continue
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
            self.merge_folder(entry, into)
        self.step("rmdir", source)
        source.rmdir()
        if self.sync_each_file:
            self.sync_folder(destination)

    def remove(self, path: Path) -> None:
        """Remove a file; a missing one is not an error."""
        self.step("remove", path)
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all it holds, as far as that goes: leftovers cost room, nothing else."""
        self.step("remove", path)
        shutil.rmtree(path, ignore_errors=True)

    def sync_file(self, path: Path) -> None:
        """Bring a file's contents to the disk."""
        if self.durable:
            with _opened(path, os.O_RDONLY) as fd:
                self._sync_fd(fd, path)

    def sync_folder(self, folder: Path) -> None:
        """Bring a folder's names to the disk; warn once where the file system cannot."""
        if self.durable:
            self._sync_folder(folder)

    def _sync_folder(self, folder: Path) -> None:
        self.step("sync", folder)
        fd = os.open(folder, _FOLDER)
        try:
            self.fsync_folder(fd)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
            if not self._warned:
                self._warned = True
                log.warning(
                    "warning: the file system of %s cannot sync folders: what is published may not survive a power cut",
                    folder,
                )
        finally:
            _close(fd)
        self.synced(folder)

    def fsync_folder(self, fd: int) -> None:
        """Sync an open folder."""
        os.fsync(fd)

    def sync_all(self, folder: Path) -> None:
        """Bring everything of the file system that holds `folder` to the disk (syncfs), as far as that does it."""
        if not self.durable:
            return
        self.step("sync", folder)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(folder, _FOLDER)
        try:
            if libc.syncfs(fd) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(folder))
        finally:
            _close(fd)
        self.synced(folder, everything=True)

    def sync_tree(self, folder: Path) -> None:
        """Bring a folder and all it holds to the disk, though nobody has synced its files yet."""
        if self.sync_each_file:
            for parent, _, names in os.walk(folder):
                for name in names:
                    self.sync_file(Path(parent, name))
                self.sync_folder(Path(parent))
        self.sync_all(folder)

    def _sync_fd(self, fd: int, path: Path) -> None:
        self.step("sync", path)
        os.fsync(fd)
        self.synced(path)


def copy_of(folder: Path) -> Path:
    """Return where `Disk.move_folder` puts together a folder that cannot be renamed."""
    return folder.with_name(f"{folder.name}.copy")


def read_file(path: Path) -> bytes | None:
    """Return the contents of a state file, or None where there is none; never through a link."""
    try:
        # A FIFO must not make the open wait for a writer.
        with _opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd, open(fd, "rb", closefd=False) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        error.filename = str(path)  # else that of a read is a number
        raise


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    # The umask alone decides who else may write: a second user of a group must be able to continue.
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)  # a network file system may report here that a write failed


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
