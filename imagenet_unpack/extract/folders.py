"""The sink of a tree: members become files in class folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.extract.sink import Copy, LeftoverError, Pace
from imagenet_unpack.model import ClassRef, Shard
from imagenet_unpack.sources.windows import NO_FLAG, RWF_DONTCACHE
from imagenet_unpack.targets.durable import Disk

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_MTIME_S = 1 << 40  # 34,000 years: what lies beyond is damage, and more than os.utime takes


class FolderSink:
    """Writes the files of one shard below a tree; safe to repeat from any state.

    Args:
        tree: the folder that holds the class folders; exists.
        pace: is asked before each step.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written, where kernel and file system can.
        disk: says whether each file has to be synced by itself.
    """

    def __init__(
        self,
        tree: Path,
        pace: Pace,
        *,
        keep_mtime: bool = False,
        uncached_writes: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self._tree = tree
        self._pace = pace
        self._keep_mtime = keep_mtime
        self._disk = disk or Disk()
        self._sync = self._disk.sync_each_file
        self._folders: set[str] = set()
        self._write = self._write_uncached if uncached_writes else self._write_cached
        self._stack = contextlib.ExitStack()
        self._single: ClassRef | None = None
        self._folder_fd = -1

    def __enter__(self) -> FolderSink:
        self._folder_fd = os.open(self._tree, _FOLDER)
        self._stack.callback(os.close, self._folder_fd)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def prepare(self, shard: Shard) -> None:
        """Make the class folders of a shard."""
        for ref in shard.classes:
            self._folders.add(ref.folder)
            if ref.folder:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(ref.folder, 0o777, dir_fd=self._folder_fd)
        # One folder: open it once and name files relative to it. Many: name them relative to the tree, whose folders
        # are all ours, as a thousand open descriptors could be more than a process may have.
        if len(shard.classes) == 1:
            self._single = shard.classes[0]
            self._folder_fd = os.open(self._single.folder or ".", _FOLDER, dir_fd=self._folder_fd)
            self._stack.callback(os.close, self._folder_fd)

    def remove(self, shard: Shard, names: Iterable[tuple[int, str]] | None) -> None:
        """Remove what an earlier attempt left: the files of these names, or (None) all of the shard's only folder."""
        if names is None:
            assert self._single is not None
            names = ((0, name) for name in os.listdir(self._folder_fd))
        for position, name in names:
            with contextlib.suppress(FileNotFoundError):
                folder = "" if self._single is not None else f"{shard.classes[position].folder}/"
                os.unlink(folder + name, dir_fd=self._folder_fd)

    def add(self, ref: ClassRef, name: str, size_bytes: int, mtime_s: float, copy: Copy) -> int:
        """Create a file, write it, and return the digest of its bytes."""
        self._pace.create()
        path = name if self._single is not None else f"{ref.folder}/{name}"
        try:
            fd = os.open(path, _CREATE, 0o644, dir_fd=self._folder_fd)
        except FileExistsError:
            raise LeftoverError(name) from None
        try:
            digest = copy(fd, self._write)
            if self._keep_mtime and abs(mtime_s) < _MAX_MTIME_S:
                os.utime(fd, (mtime_s, mtime_s))
            if self._sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        return digest

    def finish(self) -> None:
        """Sync the class folders and the tree, where each file was synced by itself."""
        if self._sync:
            for folder in {*self._folders, ""}:
                self._disk.sync_folder(self._tree / folder)

    def _write_cached(self, fd: int, view: memoryview) -> None:
        self._pace.write(len(view))
        written = os.write(fd, view)
        while written != len(view):
            view = view[written:]
            written = os.write(fd, view)

    def _write_uncached(self, fd: int, view: memoryview) -> None:
        self._pace.write(len(view))
        try:
            while len(view):
                view = view[os.pwritev(fd, [view], -1, RWF_DONTCACHE) :]  # -1: where the file stands (pwritev2(2))
        except OSError as error:
            if error.errno not in NO_FLAG:
                raise
            self._write = self._write_cached
            while len(view):
                view = view[os.write(fd, view) :]
